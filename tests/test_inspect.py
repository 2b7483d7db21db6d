"""``inspect`` as a user meets it: what it prints, what scripts get, and with which exit code it leaves."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_chatgpt.__main__ import main
from tests.conftest import chat
from tests.test_cli import CONFIGS, refused, run

ARCHITECTURE = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64}
PARTS = {"train", "validation"}


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with chats of several faults and lengths, and a config."""
    folder = tmp_path_factory.mktemp("project")
    good = [{**chat(f"question {i}", f"answer {i}").to_dict(), "id": f"chat-{i}"} for i in range(40)]
    write(folder / "chats.jsonl", good)
    write(folder / "long.jsonl", [*good, *(chat(f"Why {i}?", f"because {i} " * 40).to_dict() for i in range(20))])
    write(folder / "unlearnt.jsonl", [{"messages": [{**m, "weight": 0} for m in row["messages"]]} for row in good])
    write(folder / "partly.jsonl", [*good, {"messages": [{**m, "weight": 0} for m in chat("Unlearnt", "words").to_dict()["messages"]]}])
    (folder / "faulty.jsonl").write_text((folder / "chats.jsonl").read_text() + '{"messages": []}\n' * 2 + '{"a": 1}\n' * 8)
    config = {
        "trainer": {"default_root_dir": "runs/mine", "accelerator": "cpu"},
        "model": {"architecture": ARCHITECTURE},
        "data": {"train": "chats.jsonl", "validation": 0.2, "vocab_size": 300, "max_leak": None, "cache_dir": "cache"},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def inspect(project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs inspect in this process; gives the exit code and what was printed."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(project)
        code = 0
        try:
            main(["inspect", "-c", "mine.yaml", *arguments])
        except SystemExit as left:
            code = int(left.code or 0)
        return code, capsys.readouterr().out

    return call


def test_what_is_printed(project: Path) -> None:
    done = run("inspect", "-c", "mine.yaml", "--examples", "2", cwd=project)
    assert "\x1b" not in done.stdout and "Traceback" not in done.stderr
    for row, cells in {
        "chats.jsonl": ["40", "40", "openai 40", ""],
        "conversations": ["32", "8"],
        "examples": ["32", "8"],
        "longer than max_length": ["0", "0"],
    }.items():
        (line,) = [line for line in done.stdout.splitlines() if re.match(rf"│ {row} +│", line)]
        found = [cell.strip() for cell in line.strip("│").split("│")][1:]
        assert found == cells or (row in ("conversations", "examples") and sum(map(int, found)) == 40), line
    # Two examples, token by token; what is learnt stands between « and ».
    assert done.stdout.count(" as the model reads it; «what it learns»") == 2
    number = re.search(r"chat-(\d+) as the model reads it", done.stdout)
    assert number is not None
    shown = done.stdout[number.end() :].split("as the model reads it")[0].replace("¦", "")
    expected = f"<|im_start|>user⏎\nquestion {number[1]}<|im_end|>⏎\n<|im_start|>assistant⏎\n«answer {number[1]}<|im_end|>»⏎\n"
    assert expected in shown
    assert "Nothing that would surprise." in done.stdout
    assert not (project / "runs").exists()  # it only looks


def test_json_on_standard_output_and_nothing_else(project: Path) -> None:
    done = run("inspect", "-c", "mine.yaml", "--json", "-", "--data.packing", "true", cwd=project)
    report = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert {"command", "date", "settings", "sources", "parts", "examples", "surprises"} <= report.keys()
    assert report["command"] == "python -m lightning_chatgpt inspect -c mine.yaml --json - --data.packing true"
    assert report["surprises"] == []
    assert report["settings"]["packing"] is True and report["settings"]["max_length"] == 64
    assert report["parts"].keys() == PARTS
    for part in report["parts"].values():
        assert {"items", "examples", "tokens", "supervised", "truncated", "lost", "cut", "unsupervised"} <= part.keys()
        assert {"lengths", "turns", "roles", "sources", "policies", "padding"} <= part.keys()
        assert part["policies"].keys() == {"drop_oldest", "split", "skip"}
        assert part["padding"].keys() == {"shuffled", "grouped by length", "packed"}
        assert sum(count for _, _, count in part["lengths"]) == part["items"]
        assert part["turns"] == {"2": part["items"]}
        assert part["roles"]["user"]["messages"] == part["items"]
    assert sum(part["items"] for part in report["parts"].values()) == 40
    (source,) = report["sources"].values()
    assert (source["records"], source["items"], source["faults"]["counts"]) == (40, 40, {})
    for example in report["examples"]:
        assert example.keys() == {"id", "part", "tokens"}
        learnt = "".join(text for text, weight, _ in example["tokens"] if weight > 0)
        assert learnt == f"answer {example['id'].removeprefix('chat-')}<|im_end|>"
        assert [text for text, _, is_control in example["tokens"] if is_control] == ["<|im_start|>", "<|im_end|>"] * 2


def test_numbers_are_those_of_the_data(inspect, project: Path) -> None:
    """Against a plain loop over the file and another encoder's count: the module that trains."""
    from lightning_chatgpt import ChatDataModule

    assert inspect("--json", "report.json", "--data.train", "long.jsonl", "--max_truncated", "1")[0] == 0
    report = json.loads((project / "report.json").read_text(encoding="utf-8"))
    data = ChatDataModule(train="long.jsonl", validation=0.2, vocab_size=300, max_leak=None, max_length=64, cache_dir="cache")
    data.setup("fit")
    for part, found in report["parts"].items():
        examples = [data.datasets[part].example(i) for i in range(len(data.datasets[part]))]
        assert found["tokens"] == sum(len(ids) for ids, _ in examples)
        assert found["supervised"] == sum(int((weights > 0).sum()) for _, weights in examples)
        assert found["policies"]["drop_oldest"] == {"lost": found["lost"], "examples": len(examples)}
        assert found["policies"]["skip"]["lost"] >= found["lost"] > 0
        n_short = sum(count for low, high, count in found["lengths"] if high <= 65)
        assert found["policies"]["skip"]["examples"] == n_short
        words = sum(
            len(m["content"]) for row in map(json.loads, (project / "long.jsonl").read_text().splitlines()) for m in row["messages"]
        )
        assert sum(r["characters"] for p in report["parts"].values() for r in p["roles"].values()) == words


def test_a_page(inspect, project: Path) -> None:
    if importlib.util.find_spec("lightning_chatgpt.data.report_page") is None:
        pytest.skip("report_page is not there")
    pytest.importorskip("matplotlib")
    code, printed = inspect("--html", "report.html")
    assert code == 0
    page = (project / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>") and "</html>" in page
    assert "chats.jsonl" in page
    assert "Nothing that would surprise." in printed


def surprises(printed: str) -> str:
    """The lines that begin with !, wrapped as the terminal is wide, as one text."""
    lines = printed.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("! "))
    return " ".join(line.strip() for line in lines[first:] if line.strip())


def test_leaks_surprise(inspect) -> None:
    leaking = ("--data.validation", "chats.jsonl")
    code, printed = inspect(*leaking, "--data.max_leak", "0.1")
    assert code == 1
    assert surprises(printed) == (
        "! validation: 40 of 40 conversations stand in train too (40 word for word); set data.split_by or clean duplicates"
    )
    assert re.search(r"│ word for word in train +│ +│ 40 ", printed)
    assert inspect(*leaking, "--data.max_leak", "1")[0] == 0


def test_too_many_truncated_surprise(inspect) -> None:
    code, printed = inspect("--data.train", "long.jsonl")
    assert code == 1
    found = surprises(printed)
    for part in PARTS:
        assert re.search(
            rf"! {part}: \d+ of \d+ conversations \(\d+%\) are (?:cut|shortened) to 64 tokens, and \d+ supervised tokens are lost by that; "
            "raise data.max_length, or set data.truncation to split",
            found,
        )
    assert inspect("--data.train", "long.jsonl", "--max_truncated", "0.9")[0] == 0


def test_what_is_left_out_as_unlearnt_surprises(inspect) -> None:
    code, printed = inspect("--data.train", "partly.jsonl", "--data.validation", "null")
    assert code == 1
    assert surprises(printed) == "! train: 1 of 41 conversations have no supervised token and are left out"


def test_chats_that_teach_nothing_surprise(inspect) -> None:
    code, printed = inspect("--data.train", "unlearnt.jsonl")
    assert code == 1
    found = surprises(printed)
    for part in PARTS:
        expected = f"! {part}: no token is supervised, so nothing can be learnt; are there assistant messages with a weight above 0?"
        assert expected in found
    assert "as the model reads it" not in printed


def test_many_faults_surprise(inspect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, printed = inspect("--data.train", "faulty.jsonl", "--data.on_fault", "skip", "--json", "-")
    report = json.loads(printed)
    assert code == 1
    assert report["surprises"] == ["faulty.jsonl: 10 of 50 records are left out for their faults"]
    faults = report["sources"]["faulty.jsonl"]["faults"]
    assert faults["counts"] == {"no_messages": {"skip": 2}, "unknown_schema": {"skip": 8}}
    assert faults["places"]["no_messages"] == ["faulty.jsonl:41", "faulty.jsonl:42"]
    code, printed = inspect("--data.train", "faulty.jsonl", "--data.on_fault", "skip")
    assert code == 1
    assert surprises(printed) == f"! {report['surprises'][0]}"
    for kind, place in (("no_messages", "faulty.jsonl:41"), ("unknown_schema", "faulty.jsonl:43")):
        assert re.search(rf"│ faulty.jsonl +│ {kind} +│ .* │ {faults['counts'][kind]['skip']} +│ 0 +│ {place} +│", printed)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--exmples", "1"], "exmples is no setting; did you mean examples?"),
        (["--max_truncated", "much"], "max_truncated: 'much' cannot be used"),
        (["--data.train", "nothing.jsonl"], "nothing.jsonl: no such file or folder"),
        (["--data.train", "faulty.jsonl"], "faulty.jsonl:41: the conversation has no messages"),
        (["--data.mixture.unit", "words"], "data.mixture.unit cannot be 'words'"),
        (["--data.on_fault", "fix it"], "on_fault"),
        (["--json", "no/such/folder/report.json"], "json no/such/folder/report.json: cannot be written (No such file or directory)"),
        (["--data.max_length", "4096"], "data.max_length 4096 is more than the model's 64 positions"),
    ],
)
def test_what_cannot_be_used_gets_one_line(
    arguments: list[str], says: str, project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    assert says in refused("inspect", "-c", "mine.yaml", *arguments, capsys=capsys)


def test_plain_text_is_refused(project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    message = refused(
        "inspect", "-c", "mine.yaml", "--data.class_path", "lightning_chatgpt.TextDataModule", "--data.train", "mine.yaml", capsys=capsys
    )
    assert "inspect looks at chats; data is a TextDataModule, not a ChatDataModule" in message


def test_the_quickstart_can_be_inspected_from_a_checkout(tmp_path: Path) -> None:
    """From the checkout itself, as the first line of the config says."""
    done = run("inspect", "-c", "configs/quickstart.yaml", "--data.cache_dir", str(tmp_path), "--json", "-", cwd=CONFIGS.parent)
    report = json.loads(done.stdout)
    assert sum(part["items"] for part in report["parts"].values()) == 899
    assert report["settings"]["max_length"] == 256


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["inspect", "--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--html HTML", "--json JSON", "--examples EXAMPLES", "--max_truncated MAX_TRUNCATED", "--data CONFIG"):
        assert option in printed
    assert "exit code 1 where something" in " ".join(printed.split())
    main(["--help"])
    assert "  inspect   see what the data holds" in capsys.readouterr().out
