"""Attention that never looks beyond its own example, whatever shares a row, and spends nothing on what it must not see.

Shapes: B rows, T tokens, H heads (key and value may have fewer), E width of a head, S stretches of tokens that see each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.models.kernels import StretchAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_chatgpt.data.collate import Stretches

Attention = Literal["auto", "stretches", "sdpa", "eager", "flash_attention_2"]

NAME = "lightning_chatgpt_stretches"  # under which transformers knows it


def attention_settings(network: PreTrainedModel, stretches: Stretches) -> dict[str, Any]:
    """What a network's body is to be told, so that no example sees another.

    Args:
        network: With the attention that :func:`set_attention` chose.
        stretches: Which tokens of the batch see each other.
    """
    name = network.config._attn_implementation
    if name == NAME:
        # A mask of four dimensions is taken as it is, so that transformers builds none; it is never looked at.
        return {"attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool), "stretches": stretches}
    if name == "flash_attention_2":  # by itself it parts packed rows only where there is one of them
        ends, longest = stretches.ends, stretches.longest
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    # From positions that begin anew transformers builds a mask, if there is no other; where none does, torch keeps its fast kernel.
    return {}


def set_attention(network: PreTrainedModel, asked: Attention) -> str:
    """Choose how a network attends; changes ``network``.

    Args:
        network: A causal language model of transformers.
        asked: ``auto`` takes FlashAttention where there is a GPU and flash-attn, else attention by stretches, else ``sdpa``.

    Returns: what was chosen, and why, to be logged.

    Raises:
        ConfigError: The network or the machine does not have it.
    """
    from transformers.utils.import_utils import is_flash_attn_2_available

    flash = is_flash_attn_2_available() and torch.cuda.is_available()
    own = bool(network._supports_attention_backend)
    if asked == "flash_attention_2" and not flash:
        raise ConfigError("model.attention flash_attention_2 needs a GPU and flash-attn (pip install flash-attn); leave it at auto")
    if asked == "stretches" and not own:
        raise ConfigError(f"model.attention stretches: {type(network).__name__} has attention of its own kind; set it to sdpa or eager")
    chosen = asked
    if asked == "auto":
        # On a GPU without flash-attn, torch's kernel for stretches knows no dropout.
        dropout = getattr(network.config, "attn_pdrop", getattr(network.config, "attention_dropout", 0.0))
        own = own and not (torch.cuda.is_available() and dropout)
        chosen = "flash_attention_2" if flash else "stretches" if own else "sdpa"
    if chosen == "stretches":
        _register()
    network.set_attn_implementation(NAME if chosen == "stretches" else chosen)
    return f"attention: {chosen}" + (" (model.attention auto)" if asked == "auto" else "")


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # for generation, which has no stretches


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    stretches: Stretches | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query (B, H, T, E), key and value (B, H or fewer, T, E) -> (B, T, H, E)."""
    if stretches is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others)
    shape = query.shape
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))  # (B · T, H, E)
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and not dropout:
        from torch.nn.attention.varlen import varlen_attn

        longest, ends = stretches.longest, stretches.ends
        found = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=True)
        assert isinstance(found, Tensor)
        seen = found
    elif dropout:
        k, v = (tensor.repeat_interleave(q.size(1) // tensor.size(1), 1) for tensor in (k, v))
        scaling = scaling if scaling is not None else q.size(-1) ** -0.5
        seen = StretchAttention.apply(q, k, v, stretches.lengths, dropout, scaling)  # type: ignore[no-untyped-call]
    else:
        pieces = zip(*(torch.split(tensor, stretches.lengths) for tensor in (q, k, v)), strict=True)
        seen = torch.cat([_attend_whole(*piece, scaling=scaling) for piece in pieces])
    return seen.view(shape[0], shape[2], *seen.shape[1:]), None


def _attend_whole(query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None) -> Tensor:
    """Causal attention within one stretch, for which torch has a kernel where nothing is dropped: (n, H, E) -> (n, H, E)."""
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))  # (1, H, n, E)
    gqa = k.size(1) != q.size(1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa)[0].transpose(0, 1)
