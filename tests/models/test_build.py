"""Where models come from, and what is said when they cannot."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_chatgpt import load_model
from lightning_chatgpt.chat.tokenizer import load_tokenizer
from lightning_chatgpt.errors import ConfigError, ModelError, UserError
from lightning_chatgpt.models import build
from tests.conftest import ARCHITECTURE


def test_pretrained_weights_are_taken_and_embeddings_grow(plain_gpt2: Path) -> None:
    tokenizer = load_tokenizer(plain_gpt2)
    network = build.build_network(plain_gpt2, tokenizer=tokenizer)
    original = AutoModelForCausalLM.from_pretrained(plain_gpt2)
    assert network.get_input_embeddings().num_embeddings == len(tokenizer) == 502
    assert network.lm_head.weight is network.transformer.wte.weight
    ours, theirs = network.state_dict(), original.state_dict()
    for name, value in theirs.items():
        assert torch.equal(ours[name][: len(value)], value), name
    assert network.generation_config.eos_token_id == [501, 0]


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ({"n_layer": 24}, "model.architecture says n_layer: 24, but the weights of model.pretrained have 2"),
        ({"n_layers": 2}, "n_layers: 2, but the weights of model.pretrained have no such setting"),
    ],
)
def test_an_architecture_that_contradicts_the_weights_is_refused(plain_gpt2: Path, architecture: dict, says: str) -> None:
    """Guards against a half-random model: layers that no weights were loaded for."""
    with pytest.raises(ConfigError) as error:
        build.build_network(plain_gpt2, tokenizer=load_tokenizer(plain_gpt2), architecture=architecture)
    assert says in str(error.value)


def test_dropout_may_differ_from_the_weights(plain_gpt2: Path) -> None:
    architecture = {"resid_pdrop": 0.5, "n_layer": 2}
    network = build.build_network(plain_gpt2, tokenizer=load_tokenizer(plain_gpt2), architecture=architecture)
    assert network.transformer.h[0].mlp.dropout.p == 0.5


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ({"n_layr": 2}, "no setting 'n_layr'; did you mean n_layer?"),
        ({"n_embd": 30, "n_head": 4}, "n_embd 30 is not a multiple of n_head 4"),
        ({"vocab_size": 100}, "vocab_size 100 is less than the tokenizer's 502"),
    ],
)
def test_an_architecture_that_cannot_be_is_refused(architecture: dict, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        build.scratch_config(architecture, vocab_size=502)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("builtin:nothing", "builtin:nothing is unknown; there is builtin:smalltalk"),
        ("./no/folder", "./no/folder: no such folder"),
        ("runs/nothing", "runs/nothing: no such folder"),
        ("gpt2", "the hub cannot be reached (HF_HUB_OFFLINE is set)"),
        ("some/model", "the hub cannot be reached"),
    ],
)
def test_a_model_that_is_not_there(name: str, says: str) -> None:
    with pytest.raises(ModelError) as error:
        build.find_pretrained(name)
    assert says in str(error.value)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no model"):
        build.find_pretrained(str(tmp_path))


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections: list[socket.socket] = []
        threading.Thread(target=lambda: connections.append(server.accept()[0]), daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for connection in connections:
            connection.close()


def test_a_hub_that_never_answers_is_not_waited_for(black_hole: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against minutes of silence: the client's own time limits do not hold here."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", black_hole)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(ModelError, match=r"the hub cannot be reached .*(did not answer in 3 s|timed out)"):
        build.find_pretrained("gpt2")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="x.ckpt: (is no checkpoint|cannot be read)"):
        load_model(path)


def test_a_checkpoint_never_runs_code(tmp_path: Path) -> None:
    class Canary:
        def __reduce__(self) -> tuple:
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": Canary()}, tmp_path / "x.ckpt")
    with pytest.raises(ModelError, match="more than plain data"):
        load_model(tmp_path / "x.ckpt")
    assert not (tmp_path / "ran").exists()


def test_somebody_elses_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(ModelError, match="not saved by CausalLMModule"):
        load_model(tmp_path / "x.ckpt")


def test_broken_weights_and_configs_are_named(tmp_path: Path, plain_gpt2: Path) -> None:
    tokenizer = load_tokenizer(plain_gpt2)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((plain_gpt2 / name).read_bytes())
    with pytest.raises(UserError, match="weights cannot be loaded"):
        build.build_network(tmp_path, tokenizer=tokenizer)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be used"):
        build.build_network(tmp_path, tokenizer=tokenizer)


def test_the_builtin_base_is_there_small_and_documented() -> None:
    folder = build.find_pretrained("builtin:smalltalk")
    network, tokenizer = load_model("builtin:smalltalk")
    n_parameters = sum(p.numel() for p in network.parameters())
    assert 6e6 < n_parameters < 8e6
    assert sum(p.stat().st_size for p in folder.iterdir()) < 20e6
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == len(tokenizer)
    card = (folder / "README.md").read_text()
    assert all(word in card for word in ("chitchat-dataset", "configs/base.yaml", "bits per byte", "MIT"))


def test_scratch_takes_the_tokenizers_size(plain_gpt2: Path) -> None:
    tokenizer = load_tokenizer(plain_gpt2)
    network = build.network_from_scratch(ARCHITECTURE, tokenizer=tokenizer)
    assert network.config.vocab_size == 502
    assert network.config.eos_token_id == tokenizer.eos_token_id
