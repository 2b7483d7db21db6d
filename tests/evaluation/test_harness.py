"""The bridge to lm-eval: what its tasks read, what is refused, and that its numbers are those of a plain loop."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lightning_chatgpt.chat.conversation import Conversation
from lightning_chatgpt.chat.encoding import Encoder
from lightning_chatgpt.chat.tokenizer import tokenizer_state
from lightning_chatgpt.errors import ConfigError, DataError, ModelError, UserError
from lightning_chatgpt.evaluation import harness_data
from lightning_chatgpt.evaluation.harness import harness_folder, run_harness
from lightning_chatgpt.evaluation.records import Item, Measurer, Measuring
from lightning_chatgpt.models.build import CHECKPOINT_KEY, load_model, network_from_scratch
from lightning_chatgpt.models.export import export_folder
from tests.conftest import chat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

POSITIONS = 64
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval (the extra harness)")


@pytest.fixture(scope="module")
def network(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A GPT-2 with weights so large that each token's probability hangs on those before it."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": POSITIONS}
    return network_from_scratch({**sizes, "initializer_range": 0.3}, tokenizer=tokenizer).eval()


@pytest.fixture(scope="module")
def folder(network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_folder(network, tokenizer, tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes records as JSONL."""

    def write(*records: Any) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


def question(**settings: Any) -> dict[str, Any]:
    return {"question": "How are you?", "choices": ["I am fine.", "Blue."], "answer": 0, **settings}


def test_documents_and_questions_are_read_as_they_are_written(write: Callable[..., Path]) -> None:
    texts = [" two\n lines ", "Grüße 👋"]
    assert harness_data.documents(str(write(*({"text": text} for text in texts))), pretrained="x")["test"]["text"] == texts
    asked = [question(), question(question="A {{brace}}", choices=["'a", '"b', "c"], answer=2)]
    assert harness_data.choices(str(write(*asked)))["test"].to_list() == asked


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([question(), {"text": "x"}], 'data.jsonl:2: expected an object like {"question": "...", "choices": ["...", "..."], "answer": 0}'),
        ([question(), question(answer=2)], "data.jsonl:2: answer is 2, and not the index of a choice; give a number from 0 to 1"),
        ([question(answer=True)], "data.jsonl:1: answer is True"),
        ([question(answer="0")], "data.jsonl:1: answer is '0'"),
        ([question(choices=["x"])], "data.jsonl:1: choices holds 1; two are needed at least"),
        ([question(choices=["x", " "])], "data.jsonl:1: the choice ' ' is not a text that says something"),
        ([question(question="\n")], "data.jsonl:1: the question is empty"),
        ([question(choices=["x", "\ud800"])], "data.jsonl:1: a text holds half a character"),
        ([], "data.jsonl: holds no records"),
    ],
)
def test_a_question_that_cannot_be_used_is_told_with_its_line(write: Callable[..., Path], records: list[Any], says: str) -> None:
    with pytest.raises(DataError) as error:
        harness_data.choices(str(write(*records)))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_empty_document_is_told_with_its_line(write: Callable[..., Path]) -> None:
    """Guards against documents of no bytes, by which nothing can be divided."""
    with pytest.raises(DataError, match=r"data.jsonl:2: the text is empty"):
        harness_data.documents(str(write({"text": "a"}, {"text": ""})))


def test_chats_are_written_as_transformers_writes_them(folder: Path, write_chats: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    conversations = [chat("Hello", "Hi", "And you?", "Grüße", system="Be kind."), chat("Hello", "Hi", "Bye")]
    rows = harness_data.chats(str(write_chats(conversations)), pretrained=str(folder))["test"].to_list()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row, n_prompt, reply in zip(rows, (4, 1), ("Grüße", "Hi"), strict=True):
        messages = conversations[rows.index(row)].to_dict()["messages"][:n_prompt]
        assert row["prompt"] == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert (row["reply"], row["n_bytes"]) == (f"{reply}<|im_end|>", len(reply.encode()))


def test_a_typed_control_token_is_warned_about(folder: Path, write_chats: Callable[..., Path]) -> None:
    with pytest.warns(UserWarning, match="1 of 2 chats spell a control token"):
        harness_data.chats(str(write_chats([chat("<|im_end|>", "Hi"), chat("Hello", "Hi")])), pretrained=str(folder))


def test_a_reply_that_no_window_holds_is_left_out(folder: Path, write_chats: Callable[..., Path]) -> None:
    """Guards against an assertion within lm-eval, which has no name for it."""
    path = write_chats([chat("Hello", "Hi"), chat("Hello", "word " * POSITIONS)])
    with pytest.warns(UserWarning, match=f"1 of 2 chats are left out, as their reply is longer than the model's {POSITIONS} positions"):
        assert len(harness_data.chats(str(path), pretrained=str(folder))["test"]) == 1


def test_chats_need_a_chat_template(plain_gpt2: Path, write_chats: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="carries no chat template"):
        harness_data.chats(str(write_chats([chat("Hello", "Hi")])), pretrained=str(plain_gpt2))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"task": "local_perplexity"}, "harness task local_perplexity needs a file of its own"),
        ({"task": "local_chats", "data": "x", "apply_chat_template": True}, "no questions to write with the chat template"),
        ({"task": "local_perplexty", "data": "x"}, r"local_perplexty takes no data, .*; did you mean local_perplexity\?"),
        ({"task": "hellaswag", "data": "x"}, "hellaswag takes no data, .*; leave it out, as other tasks say themselves what they read"),
        ({"task": "local_choices", "data": "x", "limit": 0}, "limit must be at least 1, not 0"),
        ({"task": "local_choices", "data": "x", "batch_size": 0}, "batch_size must be at least 1, not 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], says: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=says):
        run_harness(Path("model"), **settings)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lightning-chatgpt\[harness\]'"):
        run_harness(Path("model"), task="local_perplexity", data="x")


def test_a_checkpoint_is_exported_for_the_while(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    saved = {"architecture": network.config.to_json_string(use_diff=False), "tokenizer": tokenizer_state(tokenizer)}
    state = {f"network.{name}": value for name, value in network.state_dict().items()}
    torch.save({CHECKPOINT_KEY: saved, "state_dict": state}, tmp_path / "x.ckpt")
    with harness_folder(tmp_path / "x.ckpt") as exported:
        ours, theirs = load_file(exported / "model.safetensors"), load_file(folder / "model.safetensors")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not exported.exists()
    with harness_folder(folder) as found:
        assert found == folder


class Loop:
    """Scores tokens one window at a time, in float64, with nothing of lm-eval's or of the package's own scoring."""

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.network = network.double()
        self.tokenizer = tokenizer

    def score(self, ids: list[int], n: int) -> float:
        """The log-likelihood of the last ``n`` of the ids, in nats."""
        with torch.no_grad():
            logits = self.network(torch.tensor([ids[:-1]])).logits[0]
        rows = logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        return float(rows[len(rows) - n :].sum())

    def document(self, text: str, *, slide: bool = True) -> float:
        """Windows side by side, each token predicted once; the last window slides back until it is full."""
        ids = [self.tokenizer.bos_token_id, *self.tokenizer(text)["input_ids"]]
        total = 0.0
        for start in range(0, len(ids) - 1, POSITIONS):
            end = min(start + POSITIONS, len(ids) - 1)
            first = max(0, end - POSITIONS) if slide else start
            total += self.score(ids[first : end + 1], end - start)
        return total

    def answer(self, context: str, answer: str) -> float:
        ids = self.tokenizer(context + answer)["input_ids"]
        return self.score(ids, len(ids) - len(self.tokenizer(context)["input_ids"]))


@pytest.fixture
def loop(network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Any:
    yield Loop(network, tokenizer)
    network.float()


@needs_lm_eval
class TestLmEval:
    """lm-eval itself."""

    def metrics(self, folder: Path, **settings: Any) -> dict[str, float]:
        found = run_harness(folder, batch_size=2, **settings)
        (result,) = found["results"].values()
        json.dumps(found)  # plain data, for a report
        return {"n": result["n"], **{name: metric["value"] for name, metric in result["metrics"].items()}}

    def test_bits_per_byte_are_those_of_a_plain_loop(
        self, folder: Path, loop: Loop, chats: list[Conversation], write: Callable[..., Path]
    ) -> None:
        said = " ".join(message.content for chat in chats[:40] for message in chat.messages)
        n_tokens = [1, 5, POSITIONS - 1, POSITIONS, POSITIONS + 1, 2 * POSITIONS, 5 * POSITIONS + 7]
        ids = loop.tokenizer(said)["input_ids"]
        texts = ["Grüße — 👋", *(loop.tokenizer.decode(ids[:n]) for n in n_tokens)]
        assert [len(loop.tokenizer(text)["input_ids"]) for text in texts[1:]] == n_tokens
        found = self.metrics(folder, task="local_perplexity", data=write(*({"text": text} for text in texts)))
        n_bytes = sum(len(text.encode()) for text in texts)
        nats = -sum(map(loop.document, texts))
        assert found["n"] == len(texts)
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)
        assert found["byte_perplexity"] == pytest.approx(math.exp(nats / n_bytes), rel=1e-6)
        assert found["word_perplexity"] == pytest.approx(math.exp(nats / sum(len(text.split()) for text in texts)), rel=1e-5)
        ours = Measurer(load_model(folder), Measuring(batch_size=2, max_new_tokens=0, stride=POSITIONS))
        scores = [record["scores"][0] for record in ours.records([Item(text, "", "") for text in texts])]
        assert sum(score["bytes"] for score in scores) == n_bytes
        assert sum(score["nll"] for score in scores) / math.log(2) / n_bytes == pytest.approx(found["bits_per_byte"], rel=1e-6)
        side_by_side = -sum(loop.document(text, slide=False) for text in texts)
        assert abs(side_by_side / nats - 1) > 1e-4  # the windows matter here

    def test_choices_are_those_of_a_plain_loop(
        self, folder: Path, loop: Loop, chats: list[Conversation], write: Callable[..., Path]
    ) -> None:
        said = [message.content[:30] for chat in chats[:60] for message in chat.messages[:2]]
        asked, by_length = [], []
        for i in range(0, len(said) - 3, 4):
            scores = [loop.answer(said[i], f" {choice}") for choice in said[i + 1 : i + 4]]
            relative = [score / len(choice) for score, choice in zip(scores, said[i + 1 : i + 4], strict=True)]
            # The likeliest is said to be the right one, so that one other choice of lm-eval's would show.
            asked.append(question(question=said[i], choices=said[i + 1 : i + 4], answer=scores.index(max(scores))))
            by_length.append(relative.index(max(relative)))
        agreed = sum(one["answer"] == best for one, best in zip(asked, by_length, strict=True))
        assert {one["answer"] for one in asked} == {0, 1, 2} and agreed < len(asked) == 30
        found = self.metrics(folder, task="local_choices", data=write(*asked))
        assert found == {"n": 30, "acc": 1.0, "acc_norm": pytest.approx(agreed / 30)}
        asked = [{**one, "answer": best} for one, best in zip(asked, by_length, strict=True)]
        found = self.metrics(folder, task="local_choices", data=write(*asked), limit=20)
        assert (found["n"], found["acc_norm"]) == (20, 1.0)

    def test_a_question_may_be_put_as_a_message(self, folder: Path, loop: Loop, write: Callable[..., Path]) -> None:
        choices = list("abcdefgh")
        context = loop.tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True)
        scores = [loop.answer(context, choice) for choice in choices]
        assert scores.index(max(scores)) != max(range(8), key=lambda i: loop.answer("Hello", f" {choices[i]}"))
        asked = question(question="Hello", choices=choices, answer=scores.index(max(scores)))
        assert self.metrics(folder, task="local_choices", data=write(asked), apply_chat_template=True)["acc"] == 1.0

    def test_bits_per_byte_of_replies_are_those_of_our_own_encoding(
        self, folder: Path, loop: Loop, write_chats: Callable[..., Path]
    ) -> None:
        conversations = [chat("Hello", "Hi"), chat("Hello", "Hi", "And you?", "Grüße, I am fine"), chat("What?", " a line\nanother")]
        encoder = Encoder(loop.tokenizer, max_length=POSITIONS, supervise="last")
        nats = 0.0
        for encoded in encoder.encode(conversations):
            (example,) = encoded.examples
            last = max(i for i, weight in enumerate(example.loss_weights) if weight)
            nats -= loop.score(example.input_ids[: last + 1], int(sum(example.loss_weights)))
        n_bytes = sum(len(c.messages[-1].content.encode()) for c in conversations)
        found = self.metrics(folder, task="local_chats", data=write_chats(conversations))
        assert found == {
            "n": 3,
            "bits_per_byte": pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6),
            "byte_perplexity": pytest.approx(math.exp(nats / n_bytes), rel=1e-6),
        }

    def test_what_is_cut_or_taken_for_a_control_token_is_warned_about(self, folder: Path, write: Callable[..., Path]) -> None:
        with pytest.warns(UserWarning, match=f"2 of 2 requests were longer than the model's {POSITIONS} positions"):
            run_harness(folder, task="local_choices", data=write(question(question="word " * 60)))
        with pytest.warns(UserWarning, match=r"1 documents spell a control token, such as <\|endoftext\|>"):
            run_harness(folder, task="local_perplexity", data=write({"text": "a<|endoftext|>b"}, {"text": "a"}))
        with pytest.raises(DataError, match=f"begins with ' word word .* are more than the model's {POSITIONS} positions"):
            run_harness(folder, task="local_choices", data=write(question(choices=["a", "word " * 60])))

    @pytest.mark.faults  # lm-eval looks through the files of its thousands of tasks
    def test_tasks_beside_the_local_ones(self, folder: Path, write: Callable[..., Path], tmp_path: Path) -> None:
        task = tmp_path / "mine.yaml"
        settings = {"task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(write(question()))}}}
        asks = {"output_type": "multiple_choice", "doc_to_text": "question", "doc_to_choice": "choices", "doc_to_target": "answer"}
        task.write_text(json.dumps({**settings, "test_split": "test", **asks}))
        assert run_harness(folder, task=str(task))["results"]["mine"]["n"] == 1
        task.write_text(json.dumps({**settings, "test_split": "nowhere", **asks}))
        refused = {
            str(task): r"mine.yaml: cannot be loaded \(KeyError: 'nowhere'\); mend the task or its data",
            "helaswag": r"'helaswag' is unknown; did you mean hellaswag\?",
            "hellaswag": r"hellaswag: cannot be loaded \(.*\); the hub cannot be reached \(HF_HUB_OFFLINE is set\)",
        }
        for name, says in refused.items():
            with pytest.raises(UserError, match=says) as error:
                run_harness(folder, task=name)
            assert "\n" not in str(error.value)

    def test_a_folder_that_cannot_be_scored_is_refused(self, folder: Path, write: Callable[..., Path], tmp_path: Path) -> None:
        data = write({"text": "a"})
        broken = shutil.copytree(folder, tmp_path / "broken")
        (broken / "model.safetensors").write_bytes(b"x" * 100)
        nameless = shutil.copytree(folder, tmp_path / "nameless")
        settings = json.loads((nameless / "tokenizer_config.json").read_text())
        (nameless / "tokenizer_config.json").write_text(
            json.dumps({k: v for k, v in settings.items() if k not in ("bos_token", "eos_token")})
        )
        for model, says in (
            (broken, r"broken: lm-eval cannot load it \(.*\)"),
            (nameless, "nameless: its tokenizer has neither bos_token"),
        ):
            with pytest.raises(ModelError, match=says) as error:
                run_harness(model, task="local_perplexity", data=data)
            assert "\n" not in str(error.value)

    def test_a_model_without_a_chat_template_scores_text_alone(self, plain_gpt2: Path, write: Callable[..., Path]) -> None:
        assert self.metrics(plain_gpt2, task="local_choices", data=write(question()))["n"] == 1
        with pytest.raises(ModelError, match="carries no chat template; leave out apply_chat_template"):
            run_harness(plain_gpt2, task="local_choices", data=write(question()), apply_chat_template=True)
