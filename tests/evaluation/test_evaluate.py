"""The evaluate verb, from files to the report."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_chatgpt import CausalLMModule, ChatDataModule
from lightning_chatgpt.__main__ import main
from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.evaluation import records
from lightning_chatgpt.evaluation.report_page import render_page
from lightning_chatgpt.models.build import load_model
from lightning_chatgpt.models.export import export_folder
from tests.conftest import trainer


@pytest.fixture
def files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_gpt2: Path, chats: list[Conversation], write_chats: Callable[..., Path]
) -> Path:
    """A working folder with ten chats and two models that differ a little."""
    monkeypatch.chdir(tmp_path)
    write_chats(chats[:10])
    network, tokenizer = load_model(plain_gpt2)
    export_folder(network, tokenizer, tmp_path / "one", facts={})
    with torch.no_grad():
        network.get_input_embeddings().weight[:40] += 0.3
    export_folder(network, tokenizer, tmp_path / "two", facts={})
    return tmp_path


def evaluate(*arguments: str) -> dict[str, Any]:
    output = arguments[arguments.index("--output") + 1] if "--output" in arguments else "evaluation"
    main(["evaluate", *arguments, "--accelerator", "cpu", "--max_new_tokens", "8"])
    report: dict[str, Any] = json.loads(Path(output, "report.json").read_text())
    return report


def values(report: dict[str, Any]) -> dict[tuple[str, str], list[float]]:
    return {(figure["part"], figure["name"]): [found["value"] for found in figure["models"]] for figure in report["figures"]}


def test_batches_change_nothing_and_it_is_what_validate_says(files: Path) -> None:
    found = [values(evaluate("one", "two", "--data", "chats.jsonl", "--batch_size", str(n), "--output", f"by{n}")) for n in (1, 3, 8)]
    for other in found[1:]:
        for key in found[0]:
            assert other[key] == pytest.approx(found[0][key], rel=1e-6), key
    for number, name in enumerate(("one", "two")):
        for packing in (False, True):
            module = CausalLMModule(pretrained=name)
            data = ChatDataModule(validation="chats.jsonl", batch_size=3, packing=packing)
            (logged,) = trainer(files).validate(module, data, verbose=False)
            for metric in ("perplexity", "bits_per_byte", "token_accuracy"):
                assert found[0]["assistant", metric][number] == pytest.approx(logged[f"val_{metric}"], rel=1e-6)


def test_a_model_against_itself_is_no_different_and_is_measured_once(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = evaluate("one", "one", "--data", "chats.jsonl")
    assert [model["name"] for model in report["models"]] == ["one", "one (2)"]
    assert {difference["verdict"] for figure in report["figures"] for difference in figure["differences"]} <= {None, "too few to tell"}
    assert all(difference["value"] in (0, None) for figure in report["figures"] for difference in figure["differences"])
    monkeypatch.setattr(records.Measurer, "records", lambda *_: pytest.fail("measured again"))
    assert values(evaluate("one", "one", "--data", "chats.jsonl")) == values(report)
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        evaluate("one", "--data", "chats.jsonl", "--limit", "9")


def test_what_was_broken_off_is_gone_on_with(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against records that come twice, or are lost."""
    arguments = ("one", "--data", "chats.jsonl", "--batch_size", "2")
    whole = evaluate(*arguments, "--output", "undisturbed")
    own, seen = records.Measurer.records, []

    def breaks(self: Any, items: Any) -> Any:
        if len(seen) == 3:
            raise RuntimeError("the power is gone")
        seen.append([item.id for item in items])
        return own(self, items)

    monkeypatch.setattr(records.Measurer, "records", breaks)
    with pytest.raises(RuntimeError, match="the power is gone"):
        evaluate(*arguments)
    monkeypatch.setattr(records.Measurer, "records", lambda self, items: seen.append([item.id for item in items]) or own(self, items))
    assert values(evaluate(*arguments)) == values(whole)
    assert sorted(name for batch in seen for name in batch) == sorted(f"chats.jsonl:{n}" for n in range(1, 11))
    (ours,), (theirs,) = (list(Path(folder, "records").iterdir()) for folder in ("evaluation", "undisturbed"))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_two_processes_say_the_same(files: Path) -> None:
    one = values(evaluate("one", "--data", "chats.jsonl"))
    arguments = ["one", "--data", "chats.jsonl", "--accelerator", "cpu", "--max_new_tokens", "8", "--devices", "2", "--output", "both"]
    subprocess.run([sys.executable, "-m", "lightning_chatgpt", "evaluate", *arguments], check=True, capture_output=True, timeout=300)
    two = values(json.loads(Path("both/report.json").read_text()))
    assert one.keys() == two.keys()
    for key in one:
        assert two[key] == pytest.approx(one[key], rel=1e-6), key


def test_a_run_is_evaluated_on_what_it_held_out(files: Path) -> None:
    data = {"class_path": "lightning_chatgpt.ChatDataModule", "init_args": {"train": "chats.jsonl", "validation": 0.4}}
    run = files / "run"
    (files / "one").rename(run)
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    (run / "metrics.csv").write_text("step,train_loss,val_loss\n0,3.5,\n1,,3.25\n1,nan,\n")
    report = evaluate("run", "two")
    module = ChatDataModule(**data["init_args"])
    expected = [
        module.load(text).id
        for source in module.load_parts("validate")["validation"]
        for text in source.table.column("content", source.rows)
    ]
    assert sorted(reply["id"] for reply in report["replies"]) == sorted(expected)
    assert report["data"]["what"] == "the validation split of run"
    assert report["models"][0]["curves"] == {"train_loss": [[0, 3.5]], "val_loss": [[1, 3.25]]}
    page = Path("evaluation/report.html").read_text()
    assert "Validation loss" in page and "run" in page


def test_plain_text_is_scored_whole(files: Path) -> None:
    text = "One long story about computers. " * 40  # longer than the model's 128 positions
    Path("story.txt").write_text(text)
    report = evaluate("one", "--text", "story.txt", "--stride", "50")
    figure = report["figures"][1]
    assert (figure["part"], figure["name"], figure["models"][0]["n"]) == ("text", "bits_per_byte", 1)
    (record,) = [json.loads(line) for line in next(Path("evaluation/records").iterdir()).read_text().splitlines()]
    assert record["scores"][0]["bytes"] == len(text)
    assert report["replies"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one"], "none of the models is a run folder that held something out; set --data FILE"),
        (["one", "--data", "chats.jsonl", "--text", "a.txt"], "data and text exclude each other"),
        (["one", "--data", "none.jsonl"], "none.jsonl: no such file or folder"),
        (["one", "--data", "chats.jsonl", "--limit", "0"], "limit must be at least 1, not 0"),
        (["none", "--data", "chats.jsonl"], "none"),
        (["one", "--data", "chats.jsonl", "--stride", "129"], "stride is a number of tokens, 1 to the model's 128 positions, not 129"),
        (["one", "--data", "chats.jsonl", "--max_new_tokens", "128"], "max_new_tokens 128 leaves no room for a prompt"),
        ([], "required: models"),
    ],
)
def test_what_cannot_be_evaluated(files: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(["evaluate", *arguments])
    assert left.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and message in said[0]


def test_a_page_escapes_what_models_say(files: Path) -> None:
    report = evaluate("one", "--data", "chats.jsonl", "--limit", "2")
    report["replies"][0]["models"][0]["reply"] = "</script><script>alert(1)</script>"
    report["models"][0]["name"] = "<b>bold</b>"
    page = render_page(report)
    assert "<script>alert" not in page and "<b>bold" not in page


def test_characters_that_end_lines_elsewhere_are_of_the_reply(files: Path) -> None:
    """Guards against records that are cut at U+2028, which JSON leaves as it is."""
    messages = [{"role": "user", "content": "one\u2028two"}, {"role": "assistant", "content": "three\u0085four"}]
    Path("odd.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 2, encoding="utf-8")
    report = evaluate("one", "--data", "odd.jsonl")
    assert [reply["reference"] for reply in report["replies"]] == ["three\u0085four"] * 2


def test_another_config_is_another_model(files: Path) -> None:
    """Guards against records of other heads, whose weights are the same."""
    before = values(evaluate("one", "--data", "chats.jsonl"))
    config = json.loads(Path("one/config.json").read_text())
    Path("one/config.json").write_text(json.dumps({**config, "n_head": 1}))
    assert values(evaluate("one", "--data", "chats.jsonl"))["all tokens", "perplexity"] != before["all tokens", "perplexity"]


def test_weights_that_are_no_numbers_are_reported(files: Path) -> None:
    network, tokenizer = load_model("two")
    with torch.no_grad():
        network.get_input_embeddings().weight.fill_(float("nan"))
    export_folder(network, tokenizer, files / "broken", facts={})
    report = evaluate("one", "broken", "--data", "chats.jsonl")
    assert values(report)["assistant", "perplexity"][1] is None
    assert "NaN" not in Path("evaluation/report.json").read_text() and "NaN" not in Path("evaluation/report.html").read_text()


def test_fewer_items_than_processes_are_refused(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a process that waits for one without work."""
    with pytest.raises(SystemExit):
        main(["evaluate", "one", "--data", "chats.jsonl", "--limit", "1", "--devices", "2", "--accelerator", "cpu"])
    assert "error: 1 item(s) are too few for 2 processes" in capsys.readouterr().err


def test_fairness_stands_in_the_report_and_does_without_data_that_are_gone(files: Path) -> None:
    record = (
        '{{"messages": [{{"role": "user", "content": "Hi {n}"}}, {{"role": "assistant", "content": "Hello {n}"}}], "dialect": "{d}"}}\n'
    )
    Path("groups.jsonl").write_text("".join(record.format(n=n, d="north" if n % 2 else "south") for n in range(24)))
    Path("mine.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "She is {term}."}, {"role": "assistant", "content": "Good."}]}\n'
        '{"axis": "work", "terms": {"cook": "a cook", "judge": "a judge"}}\n'
    )
    run = files / "run"
    (files / "one").rename(run)
    data = {"class_path": "lightning_chatgpt.ChatDataModule", "init_args": {"train": "gone.jsonl"}}
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    settings = ("--data", "groups.jsonl", "--fairness.group", "dialect", "--fairness.counterfactual", "mine.jsonl")
    with pytest.warns(UserWarning, match="run: what it was trained on cannot be looked at .*gone.jsonl: no such file"):
        found = evaluate("run", *settings)["fairness"]
    (model,) = found["models"]
    assert found["audit"] is None and model["groups"]["groups"] == {"north": 12, "south": 12}
    assert [pair["axis"] for pair in model["counterfactual"]["pairs"]] == ["work"]
    assert "Fairness of run" in Path("evaluation/report.html").read_text()
    data["init_args"]["train"] = "groups.jsonl"
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    assert evaluate("run", *settings)["fairness"]["audit"]["groups"].keys() == {"north", "south"}


def test_the_harness_says_the_same_in_one_report(files: Path) -> None:
    """Also of a text that repeats itself: guards against lm-eval's cache, which takes windows that read the same for the same."""
    pytest.importorskip("lm_eval")
    Path("docs.jsonl").write_text("".join(json.dumps({"text": f"The story number {n}. " * n}) + "\n" for n in (1, 9, 90)))
    report = evaluate("one", "two", "--text", "docs.jsonl", "--stride", "128", "--harness", "local_perplexity")
    theirs = [found["results"]["local_perplexity"]["metrics"]["bits_per_byte"]["value"] for found in report["harness"]]
    assert theirs == pytest.approx(values(report)["text", "bits_per_byte"], rel=1e-6)
    assert theirs[0] != theirs[1]
    assert "In lm-evaluation-harness" in Path("evaluation/report.html").read_text()
