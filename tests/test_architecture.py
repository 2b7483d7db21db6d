"""The rooms and who may import whom; what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lightning_chatgpt"

# A room may import rooms of a lower floor, and its own. One door is open besides: data and models meet in the Batch.
FLOORS = {
    "errors": 0,
    "arguments": 1,
    "processes": 1,
    "versions": 1,
    "checkpoints": 2,
    "hub": 1,
    "memory": 1,
    "plots": 1,
    "precision": 1,
    "quiet": 1,
    "settings": 1,
    "chat": 1,
    "pages": 2,
    "generation": 2,
    "metrics": 2,
    "callbacks": 3,
    "models": 3,
    "data": 3,
    "configuration": 4,
    "evaluation": 4,
    "finders": 4,
    "serving": 4,
    "trials": 4,
    "commands": 5,
    "run_folder": 5,
    "cli": 6,
    "__main__": 7,
}
DOORS = {("models/loss.py", "data.collate"), ("models/attention.py", "data.collate"), ("models/causal_lm.py", "data.collate")}


def imports(path: Path) -> list[str]:
    """The package's own modules that a file imports, without the package's name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_chatgpt."):
            found.append((node.module or "").removeprefix("lightning_chatgpt."))
    return found


def test_every_import_goes_down_a_floor() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE)
        room = place.parts[0].removesuffix(".py")
        if room == "__init__":
            continue  # the public names
        for module in imports(path):
            other = module.split(".")[0]
            if other != room and FLOORS[other] >= FLOORS[room] and (place.as_posix(), module) not in DOORS:
                wrong.append(f"{place} imports {module}")
    assert wrong == []


def test_chat_and_metrics_know_no_lightning() -> None:
    for room in ("chat", "metrics"):
        for path in (PACKAGE / room).glob("*.py"):
            assert "lightning.pytorch" not in path.read_text(), path


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = (
        "import sys, lightning_chatgpt, lightning_chatgpt.__main__, lightning_chatgpt.errors\n"
        "print([m for m in ('torch', 'transformers', 'lightning', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import lightning_chatgpt

    for name in lightning_chatgpt.__all__:
        assert getattr(lightning_chatgpt, name) is not None
    assert set(lightning_chatgpt._ROOMS) | {"__version__"} == set(lightning_chatgpt.__all__)
