"""``export``: a model as a plain transformers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning_chatgpt.errors import ConfigError


def export(
    model: str,
    output: str,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    overwrite: bool = False,
) -> None:
    """Write a model as a plain transformers folder, with tokenizer, chat template and model card.

    Args:
        model: A run folder, a .ckpt, a transformers folder, builtin:NAME, or a hub name.
        output: The folder to write.
        dtype: Number format of the weights; 16 bits halve the size.
        overwrite: Whether a folder that is not empty is written into all the same.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise ConfigError(f"{output}: is not empty; name another folder, or add --overwrite true")
    import torch
    from transformers.utils import logging

    from lightning_chatgpt.models.build import load_model
    from lightning_chatgpt.models.export import export_folder

    logging.disable_progress_bar()
    network, tokenizer = load_model(model)
    export_folder(network.to(getattr(torch, dtype)), tokenizer, folder, facts={"Exported from": model})
    print(f"{model} written to {folder}; talk to it: python -m lightning_chatgpt chat {folder}")
