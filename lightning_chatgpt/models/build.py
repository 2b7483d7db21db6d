"""A network and its tokenizer: from the hub, a folder, a run, a checkpoint, the built-in base, or from scratch."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_chatgpt.chat.tokenizer import load_tokenizer, stop_token_ids, tokenizer_from_state
from lightning_chatgpt.checkpoints.file import read_plain
from lightning_chatgpt.checkpoints.weights import check_weights
from lightning_chatgpt.errors import ConfigError, ModelError
from lightning_chatgpt.hub import hub_problem
from lightning_chatgpt.models.adapters import (
    LoraSettings,
    add_adapter,
    load_adapter_state,
    merge_adapter,
    quantization_config,
    weights_digest,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import GPT2Config, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

BUILTIN_PREFIX = "builtin:"
CHECKPOINT_KEY = "lightning_chatgpt"  # where a checkpoint keeps its architecture and tokenizer
NETWORK_PREFIX = "network."  # what CausalLMModule calls the network in its state

_BUILTIN_FOLDER = Path(__file__).parent.parent / "base"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*",
              "merges.txt", "special_tokens_map.json", "added_tokens.json"]  # fmt: skip
_FREE_TO_CHANGE = {"resid_pdrop", "embd_pdrop", "attn_pdrop"}  # dropout leaves the weights' shape and meaning alone


class LoadedModel(NamedTuple):
    """A network in evaluation mode, and the tokenizer it was trained with."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


def load_model(source: str | Path) -> LoadedModel:
    """Load a model to talk to or to export.

    Args:
        source: A run folder, a ``.ckpt``, a transformers folder, ``builtin:NAME``, or a hub name.

    Raises:
        ModelError: There is no such model, or it cannot be loaded.
    """
    if str(source).endswith(".ckpt"):
        return _load_checkpoint(Path(source))
    folder = find_pretrained(str(source))
    tokenizer = load_tokenizer(folder)
    network = build_network(folder, tokenizer=tokenizer)
    return LoadedModel(network.eval(), tokenizer)


def find_pretrained(name: str) -> Path:
    """Find the transformers folder that a name stands for: on this machine first, then on the hub.

    Args:
        name: ``builtin:NAME``, a transformers folder, a run folder, or a hub name.

    Raises:
        ModelError: It is not there, or the hub cannot be reached.
    """
    if name.startswith(BUILTIN_PREFIX):
        folder = _BUILTIN_FOLDER / name.removeprefix(BUILTIN_PREFIX)
        if not (folder / "config.json").is_file():
            known = ", ".join(sorted(f"{BUILTIN_PREFIX}{p.parent.name}" for p in _BUILTIN_FOLDER.glob("*/config.json")))
            raise ModelError(f"{name} is unknown; there is {known or 'none in this installation'}")
        return folder
    path = Path(name).expanduser()
    if path.is_dir():
        for folder in (path, path / "hf"):
            if (folder / "config.json").is_file():
                return folder
        raise ModelError(f"{name}: the folder holds no model (no config.json in it or in its hf/); is the run finished?")
    if path.is_file():
        raise ModelError(f"{name}: is a file; name the folder it is in, or a .ckpt where a checkpoint is asked for")
    if not _HUB_NAME.fullmatch(name) or name[0] == "." or name.startswith(("runs/", "checkpoints/")):
        raise ModelError(f"{name}: no such folder")
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    def snapshot(*, local_files_only: bool) -> Path:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=local_files_only))

    def is_complete(folder: Path) -> bool:
        return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))

    try:
        folder = snapshot(local_files_only=True)
        if is_complete(folder):
            return folder
    except LocalEntryNotFoundError:
        pass  # not in the cache: ask the hub
    reason = hub_problem()
    if reason is not None:
        raise ModelError(
            f"{name}: no such folder here, not in the cache ({HF_HUB_CACHE}), and the hub cannot be reached ({reason}); connect and try "
            f"again, or name a folder that holds it (hf download {name} --local-dir FOLDER, where there is a network)"
        )
    try:
        folder = snapshot(local_files_only=False)
    except RepositoryNotFoundError:
        raise ModelError(f"{name}: no such folder here and no such model on the hub (or it needs a login)") from None
    except HfHubHTTPError as error:
        raise ModelError(f"{name}: the hub answered {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise ModelError(f"{name}: the download broke off ({str(error).splitlines()[0]}); try again") from None
    if not is_complete(folder):
        raise ModelError(f"{name}: the hub's model has no safetensors weights; convert it, or take one that has")
    return folder


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this package; plain data only, so that loading never runs code.

    Raises:
        ModelError: It is not there, damaged, or not one of ours.
    """
    checkpoint = read_plain(path)
    if CHECKPOINT_KEY not in checkpoint:
        raise ModelError(f"{path}: holds no architecture and tokenizer; it was not saved by CausalLMModule")
    return checkpoint


def _load_checkpoint(path: Path) -> LoadedModel:
    checkpoint = read_checkpoint(path)
    tokenizer = tokenizer_from_state(checkpoint[CHECKPOINT_KEY]["tokenizer"])
    saved = checkpoint[CHECKPOINT_KEY]
    network = network_from_checkpoint(saved, tokenizer=tokenizer)
    if holds_adapter_only(saved):
        load_adapter_state(network, network_state(checkpoint))
    else:
        network.load_state_dict(network_state(checkpoint))
    return LoadedModel(merge_adapter(network) if "adapter" in saved else network.eval(), tokenizer)


def holds_adapter_only(saved: Mapping[str, Any]) -> bool:
    """Whether a checkpoint leaves the frozen weights to the base that it names."""
    return "adapter" in saved and not saved["adapter"]["settings"].get("save_base")


def network_from_checkpoint(saved: Mapping[str, Any], *, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The network that a checkpoint's weights fit; an adapter's base has its own already.

    Args:
        saved: What the checkpoint holds under CHECKPOINT_KEY.
        tokenizer: The checkpoint's.

    Raises:
        ModelError: The base that the checkpoint names is not there, or has other weights.
    """
    architecture = json.loads(saved["architecture"])
    adapter = saved.get("adapter")
    if adapter is None:
        return network_from_config(architecture, tokenizer=tokenizer)
    settings = LoraSettings.of(adapter["settings"])
    if settings.save_base:
        network = network_from_config(architecture, tokenizer=tokenizer)
    else:
        folder = find_pretrained(adapter["base"])
        if weights_digest(folder) != adapter["digest"]:
            raise ModelError(
                f"{adapter['base']}: has other weights than those that the checkpoint's adapter was trained on; "
                "put them back, or train with model.lora.save_base true"
            )
        dropout = {key: value for key, value in architecture.items() if key in _FREE_TO_CHANGE}
        network = build_network(folder, tokenizer=tokenizer, architecture=dropout, quantized=settings.quantize is not None)
    return add_adapter(network, settings, new_token_ids=adapter["new_token_ids"])


def network_state(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The network's own weights in a checkpoint, under the names that transformers gives them."""
    state = checkpoint["state_dict"]
    return {k.removeprefix(NETWORK_PREFIX): v for k, v in state.items() if k.startswith(NETWORK_PREFIX)}


def read_config(folder: Path) -> PretrainedConfig:
    """Read a transformers folder's config.

    Raises:
        ModelError: It is not one.
    """
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: config.json cannot be used ({str(error).strip().splitlines()[0]})") from None
    return config


def scratch_config(architecture: Mapping[str, Any], *, vocab_size: int | None = None) -> GPT2Config:
    """A GPT-2 config from an ``architecture``.

    Args:
        architecture: Settings of transformers' ``GPT2Config``, such as n_layer, n_head, n_embd, n_positions.
        vocab_size: The tokenizer's, once it is known.

    Raises:
        ConfigError: A setting is unknown, contradicts the tokenizer, or the sizes do not fit each other.
    """
    from transformers import GPT2Config

    known = {k for k in GPT2Config().to_dict() if not k.startswith("_")}
    for key in architecture:
        if key not in known or key == "model_type":
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see transformers' GPT2Config for the settings there are"
            raise ConfigError(f"model.architecture has no setting {key!r}; {hint}")
    asked = architecture.get("vocab_size")
    if asked is not None and vocab_size is not None and asked < vocab_size:
        raise ConfigError(f"model.architecture.vocab_size {asked} is less than the tokenizer's {vocab_size}; leave it out")
    # GPT-2's own control tokens are beyond a smaller vocabulary; the tokenizer's are set when there is one.
    own = {"bos_token_id": None, "eos_token_id": None, "vocab_size": vocab_size or 0}
    for key in ("n_layer", "n_head", "n_embd", "n_positions"):
        value = architecture.get(key, 1)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"model.architecture.{key} must be a whole number of at least 1, not {value!r}")
    try:
        config = GPT2Config(**{**own, **architecture})
    except Exception as error:  # transformers' validation has exceptions of its own kind
        raise ConfigError(f"model.architecture cannot be used: {' '.join(str(error).split())}") from None
    if config.n_embd % config.n_head:
        raise ConfigError(f"model.architecture: n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
    return config


def build_network(
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerFast,
    architecture: Mapping[str, Any] | None = None,
    quantized: bool = False,
) -> PreTrainedModel:
    """Load weights from a transformers folder and make room for the tokenizer's new tokens.

    Args:
        folder: Holds config.json and weights.
        tokenizer: What the network will be fed.
        architecture: What the user asked for; dropout may differ from the weights', nothing else.
        quantized: Whether its linear layers are held in 4 bits.

    Raises:
        ConfigError: ``architecture`` contradicts the weights.
        ModelError: The weights cannot be loaded.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    for key, value in (architecture or {}).items():
        if key in _FREE_TO_CHANGE and hasattr(config, key):
            setattr(config, key, value)
        elif not hasattr(config, key) or getattr(config, key) != value:
            there = getattr(config, key, "no such setting")
            raise ConfigError(
                f"model.architecture says {key}: {value}, but the weights of model.pretrained have {there}; "
                "remove it, or set model.pretrained to null to start from scratch"
            )
    n_rows, n_entries = getattr(config, "vocab_size", None), tokenizer.vocab_size  # control tokens that were added aside
    if n_rows is not None and n_entries > n_rows:
        raise ModelError(
            f"{folder}: its tokenizer has {n_entries} entries, and its weights are for {n_rows}; put the tokenizer there that they were "
            "trained with"
        )
    check_weights(folder)
    settings: Any = {"quantization_config": quantization_config()} if quantized else {}
    try:
        network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False, dtype=torch.float32, **settings
        )
    except pickle.UnpicklingError:
        raise ModelError(f"{folder}: its weights hold more than plain data, which could run code; take safetensors") from None
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{folder}: the weights cannot be loaded ({str(error).strip().splitlines()[0]}); download or export them again"
        ) from None
    _fit_to_tokenizer(network, tokenizer)
    return network


def network_from_config(settings: Mapping[str, Any], *, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A network with random weights from a full transformers config, as a checkpoint holds it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(settings)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    network: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    _fit_to_tokenizer(network, tokenizer)
    return network


def network_from_scratch(architecture: Mapping[str, Any], *, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A GPT-2 with random weights for a tokenizer.

    Raises:
        ConfigError: The architecture cannot be used.
    """
    from transformers import GPT2LMHeadModel

    network = GPT2LMHeadModel(scratch_config(architecture, vocab_size=len(tokenizer)))
    _fit_to_tokenizer(network, tokenizer)
    return network


def _fit_to_tokenizer(network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    from transformers import GenerationConfig

    # Never shrink: some weights have more rows than their tokenizer has tokens.
    if len(tokenizer) > len(network.get_input_embeddings().weight):  # type: ignore[arg-type]
        network.resize_token_embeddings(len(tokenizer))
    network.config.bos_token_id = tokenizer.bos_token_id
    network.config.eos_token_id = tokenizer.eos_token_id
    # Whoever loads the exported folder stops where we stop.
    network.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_token_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
