"""Every command and every Python block in README and docs is run, in order, as it stands; training is cut to two steps."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import chat

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(bash|python|yaml)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHORT = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu"]
CHECKS = {"pytest", "ruff check .", "ruff format --check .", "mypy"}


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[str]:
    lines = [line for kind, text in blocks(page) if kind == "bash" for line in text.splitlines() if line]
    return [command for line in lines for command in line.split(" && ")]


@pytest.fixture
def workspace(tmp_path: Path, plain_gpt2: Path, write_chats: Callable[..., Path]) -> Path:
    """A user's folder: the shipped configs, chats, texts, a small GPT-2 under the hub's name, a finished quickstart."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    write_chats([chat(f"question {i}", f"answer {i}") for i in range(30)])
    (tmp_path / "texts").mkdir()
    for i in range(8):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"The text number {i}. " * 50)
    shutil.copytree(plain_gpt2, tmp_path / "gpt2")
    return tmp_path


def run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_the_commands_of_a_page(page: Path, workspace: Path) -> None:
    is_named = any("runs/quickstart" in text for kind, text in blocks(page) if kind != "yaml")
    needs_quickstart = is_named and page.name not in ("README.md", "quickstart.md")
    if needs_quickstart:
        run([sys.executable, "-m", "lightning_chatgpt", "fit", "-c", "configs/quickstart.yaml", *SHORT], workspace)
    for kind, text in blocks(page):
        named = re.match(r"# (\S+\.(?:py|yaml))\n", text)
        if named:
            (workspace / named[1]).write_text(text)
        elif kind == "python":
            assert run([sys.executable, "-c", text], workspace).strip()
        elif kind == "bash":
            for command in (part for line in text.splitlines() if line for part in line.split(" && ")):
                run_command(command, workspace)


def run_command(command: str, workspace: Path) -> None:
    words = shlex.split(command)
    if words[0] in ("pip", "pytest"):
        return  # test_the_setup_commands_are_ci's looks after these
    assert words[:3] == ["python", "-m", "lightning_chatgpt"], command
    arguments = words[3:]
    if arguments[0] == "fit" and "--print_config" not in arguments:
        if "base" in command or "chitchat" in command or "pretrain" in command:
            arguments += [] if "--data.train" in arguments else ["--data.train", "corpus:chatterbot/english"]
        if "gpt2.yaml" in command:
            arguments += ["--data.max_length", "128"]  # all that the small stand-in has positions for
        # Overwriting and going on are left as they stand: the run before them ended at two steps.
        arguments += ["--trainer.max_steps", "4", *SHORT[2:]] if "--ckpt_path" in arguments else SHORT
    if arguments[0] in ("validate", "test"):
        arguments += ["--trainer.limit_val_batches", "1"]
    out = run([sys.executable, "-m", "lightning_chatgpt", *arguments], workspace)
    assert out or arguments[0] == "chat", command


def test_the_setup_commands_are_cis() -> None:
    """What needs a fresh environment is run by .ci/run, word for word."""
    ci = (ROOT / ".ci" / "run").read_text().replace("pip install -q", "pip install")
    for page in PAGES:
        for command in commands(page):
            if command.startswith("pip "):
                assert command in ci, f"{page.name}: {command}"
            elif page.name == "CONTRIBUTING.md":
                assert command in CHECKS


def test_every_link_and_file_named_is_there() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        for named in re.findall(r"\bconfigs/[\w/]+\.yaml", text):
            assert (ROOT / named).is_file(), f"{page.name}: {named}"


def test_every_shipped_config_is_in_the_docs() -> None:
    table = (ROOT / "docs" / "configs.md").read_text()
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert f"`{path.relative_to(ROOT / 'configs').with_suffix('')}`" in table


def test_json_in_the_docs_is_read(tmp_path: Path) -> None:
    from lightning_chatgpt.data.sources import read_conversations

    for text in re.findall(r"^```json\n(.*?)^```", (ROOT / "docs" / "data.md").read_text(), re.MULTILINE | re.DOTALL):
        path = tmp_path / "docs.jsonl"
        path.write_text("".join(json.dumps(json.loads(line)) + "\n" for line in text.splitlines()))
        assert len(list(read_conversations(str(path)))) == len(text.splitlines())
