"""Adapters: LoRA and its kin on frozen weights, with rows of their own for new tokens; library peft.

Shapes: r rank of the adapter, D_in and D_out widths of a layer, N new tokens, D width of the network, V entries of the vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_chatgpt.errors import ConfigError, ModelError, nearest
from lightning_chatgpt.settings import check_settings

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast

Variant = Literal["lora", "dora", "rslora"]

_ADAPTER = "default"  # peft's name of an adapter that was given none
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the largest logit; summing in another order costs float32 about 1e-5
_TOLERANCE_HALF = 5e-2


@dataclass(frozen=True)
class LoraSettings:
    """What is trained in place of the weights: for a layer W (D_out, D_in) the product B A of two small matrices, added to it.

    Attributes:
        rank: r; A is (r, D_in), B is (D_out, r).
        alpha: The product is multiplied by alpha / rank. Source: Hu et al. 2021, section 4.1.
        dropout: Share of what goes into A that is dropped in training.
        targets: The layers, by the last parts of their names, such as c_attn; None for every linear layer but the head.
        variant: ``lora``; ``rslora`` multiplies by alpha / √rank instead (Kalajdzievski 2023, section 3.2); ``dora`` trains the length
            of each of W's D_out vectors too, and takes only their direction from W + B A (Liu et al. 2024, eq. 5).
        quantize: ``4bit`` holds the frozen weights in 4 bits.
        save_base: Checkpoints hold the frozen weights too.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: list[str] | None = None
    variant: Variant = "lora"
    quantize: Literal["4bit"] | None = None
    save_base: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> LoraSettings:
        """Read ``model.lora``.

        Raises:
            ConfigError: A setting is unknown or out of range, two contradict each other, or peft is not installed.
        """
        lora = cls(**check_settings("model.lora", settings, cls))
        if lora.rank < 1:
            raise ConfigError(f"model.lora.rank must be at least 1, not {lora.rank}")
        if lora.alpha <= 0:
            raise ConfigError(f"model.lora.alpha must be above 0, not {lora.alpha}")
        if not 0 <= lora.dropout < 1:
            raise ConfigError(f"model.lora.dropout must be at least 0 and below 1, not {lora.dropout}")
        if lora.targets == []:
            raise ConfigError("model.lora.targets names no layer; name some, or leave it out for every linear layer")
        if lora.quantize and lora.save_base:
            raise ConfigError("model.lora: quantize rounds the base, so that save_base has none to save; leave one out")
        if importlib.util.find_spec("peft") is None:
            raise ConfigError("model.lora needs the package peft, which is not installed: pip install 'lightning-chatgpt[lora]'")
        return lora


def quantization_config() -> BitsAndBytesConfig:
    """What makes ``from_pretrained`` hold a network's linear layers in 4 bits: NF4, its scales quantized too.

    The head and the embeddings stay as they are. GPT-2's ``Conv1D`` becomes a linear layer that lies the usual way round.

    Source: Dettmers et al. 2023, section 3.

    Raises:
        ConfigError: bitsandbytes or a device that it works on is missing.
    """
    from transformers import BitsAndBytesConfig

    # bitsandbytes works on processors too, but evaluating there rounds the weights anew, for good (seen with 0.50).
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        raise ConfigError("model.lora.quantize 4bit needs a GPU, and there is none on this machine; remove it")
    try:
        bitsandbytes = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ConfigError(
            f"model.lora.quantize 4bit needs the package bitsandbytes, which cannot be imported ({error}): pip install bitsandbytes"
        ) from None
    known = bitsandbytes.supported_torch_devices
    if device.type not in known:
        raise ConfigError(f"model.lora.quantize 4bit: bitsandbytes works on {', '.join(sorted(known))}, not on {device.type}; remove it")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def find_new_tokens(folder: Path, *, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Find the ids that a tokenizer has beyond the one in a transformers folder: those that the folder's weights never saw."""
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(str(folder), local_files_only=True).get_vocab()
    return sorted(set(tokenizer.get_vocab().values()) - set(own.values()))


def weights_digest(folder: Path) -> str:
    """SHA-256 of the weights in a transformers folder, which tells whether an adapter was trained on them."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def add_adapter(network: PreTrainedModel, settings: LoraSettings, *, new_token_ids: Sequence[int] = ()) -> PreTrainedModel:
    """Freeze a network and add an adapter to it, which changes nothing yet: B begins as 0.

    New tokens get trainable rows of the embedding, and of the head, which is the same matrix where the two are tied. The rows begin as
    the network has them: the mean of all others where transformers has grown the matrix. Everything else of it stays frozen.

    The network stays what it is, so that ``network(...)`` and ``network.generate`` go on as before, and
    ``network.get_output_embeddings().weight`` is the head with the rows in place, (V, D), with gradients to them.

    Args:
        network: What to change; as many rows as the tokenizer has tokens.
        settings: What the adapter is like.
        new_token_ids: The ids of the new tokens.

    Returns: the network.

    Raises:
        ConfigError: The settings name a layer that is not there.
        ModelError: New tokens cannot be taught to the network's head.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # only divided
        lora_dropout=settings.dropout,
        target_modules=_targets(network, settings.targets),
        use_dora=settings.variant == "dora",
        use_rslora=settings.variant == "rslora",
        trainable_token_indices={name: list(new_token_ids) for name in _vocabulary_layers(network)} if new_token_ids else None,
        task_type="CAUSAL_LM",
    )
    _inject(network, config)
    return network


def _inject(network: PreTrainedModel, config: LoraConfig) -> None:
    from transformers.pytorch_utils import Conv1D

    # GPT-2's Conv1D stores (D_in, D_out), all others (D_out, D_in); no network has both but for its head, which is no target.
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in network.modules())
    network.add_adapter(config)
    network.train(network.training)  # peft's own layers begin in training, whatever the network does


def _targets(network: PreTrainedModel, names: Sequence[str] | None) -> list[str]:
    """The full names of the layers to adapt."""
    from transformers.pytorch_utils import Conv1D

    head = network.get_output_embeddings()
    linear = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head]
    for target in names or ():
        if not any(_is_named(name, target) for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(f"model.lora.targets: {target!r} is none of the layers that can be adapted; {nearest(target, known)}")
    return [name for name in linear if names is None or any(_is_named(name, target) for target in names)]


def _is_named(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _vocabulary_layers(network: PreTrainedModel) -> list[str]:
    """The names of the embedding and, where that is another matrix, of the head."""
    embedding: Any = network.get_input_embeddings()
    head: Any = network.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        # peft leaves the bias out where it takes rows for a head's.
        raise ModelError(
            f"{type(network).__name__}: its head has a bias, and new tokens cannot be taught to it by model.lora; leave it out"
        )
    names = {id(module): name for name, module in network.named_modules()}
    return [names[id(embedding)]] if head.weight is embedding.weight else [names[id(embedding)], names[id(head)]]


def has_adapter(network: PreTrainedModel) -> bool:
    """Whether a network has an adapter."""
    return bool(getattr(network, "peft_config", None))


def _adapter_parameters(network: PreTrainedModel) -> dict[str, nn.Parameter]:
    """A tied head's rows are the embedding's, and come once."""
    return {name: p for name, p in network.named_parameters() if ".lora_" in name or ".trainable_tokens_delta." in name}


def adapter_state(network: PreTrainedModel) -> dict[str, Tensor]:
    """The adapter and the rows of new tokens: all that training changes, under the names that the network's state has for them."""
    return {name: parameter.detach() for name, parameter in _adapter_parameters(network).items()}


def load_adapter_state(network: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Put back what :func:`adapter_state` gave.

    Args:
        network: With an adapter; what to change.
        state: Other entries than the adapter's are refused.

    Raises:
        ModelError: The state is another adapter's.
    """
    parameters = _adapter_parameters(network)
    for name in parameters.keys() | state.keys():
        there, here = (tuple(found[name].shape) if name in found else "absent" for found in (state, parameters))
        if there != here:
            raise ModelError(f"the saved adapter does not fit: {name} is {there} in it and {here} here; set model.lora as it was trained")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def merge_adapter(network: PreTrainedModel) -> PreTrainedModel:
    """The network with its adapter worked into the weights: a plain network of transformers, without peft.

    Weights held in 4 bits become float32 on the processor, with the values that they were rounded to.

    Args:
        network: With an adapter; it stays as it is.

    Returns: a copy, in evaluation mode, whose logits were compared with the network's.

    Raises:
        ModelError: The logits differ.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    merged: Any = _whole_copy(network) if getattr(network, "is_loaded_in_4bit", False) else copy.deepcopy(network)
    for name, module in list(merged.named_modules()):
        if isinstance(module, TrainableTokensWrapper):
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        elif isinstance(module, BaseTunerLayer) and ".token_adapter" not in name:
            module.merge()
            plain = module.get_base_layer()
        else:
            continue
        merged.set_submodule(name, plain)
    del merged.peft_config
    merged._hf_peft_config_loaded = False  # or save_pretrained would look for an adapter
    merged.requires_grad_(True).eval()
    _check_logits(merged, network)
    return merged  # type: ignore[no-any-return]


def _whole_copy(network: PreTrainedModel) -> PreTrainedModel:
    """A copy with the same adapter on float32 weights, which are those that the 4 bits stand for."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight
    from transformers.pytorch_utils import Conv1D

    config = copy.deepcopy(network.config)
    del config.quantization_config
    whole: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # The frozen ones go by the names that they have without an adapter.
    weights = {name.replace(".token_adapter", "").replace(".base_layer", ""): p for name, p in network.named_parameters()}
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            weight = dequantize_bnb_weight(weights[name])
            is_turned = weight is not weights[name] and isinstance(whole.get_submodule(name.rpartition(".")[0]), Conv1D)
            parameter.copy_(weight.T if is_turned else weight)
    adapter: Any = network.peft_config[_ADAPTER]
    _inject(whole, copy.deepcopy(adapter))
    load_adapter_state(whole, adapter_state(network))
    return whole


@torch.no_grad()
def _check_logits(merged: PreTrainedModel, network: PreTrainedModel) -> None:
    adapter: Any = network.peft_config[_ADAPTER]
    new = next(iter((adapter.trainable_token_indices or {"": []}).values()))
    spread = torch.linspace(0, network.config.vocab_size - 1, 64).long()
    ids = torch.tensor([*new, *spread.tolist()])[None, : network.config.max_position_embeddings]  # (1, T)
    was_training, precision = network.training, torch.get_float32_matmul_precision()
    network.eval()
    torch.set_float32_matmul_precision("highest")  # what a GPU may round off in training would look like a difference
    found, expected = (
        model(input_ids=ids.to(model.device), attention_mask=torch.ones_like(ids).to(model.device), use_cache=False).logits.double().cpu()
        for model in (merged, network)
    )
    torch.set_float32_matmul_precision(precision)
    network.train(was_training)
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= _TOLERANCE.get(network.dtype, _TOLERANCE_HALF) * largest:  # NaN is refused too
        raise ModelError(
            f"the adapter cannot be merged: logits differ by {difference:.3g} where they reach {largest:.3g}; "
            "are its weights finite? load the model in float32 and export again"
        )
