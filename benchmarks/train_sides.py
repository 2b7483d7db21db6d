"""The sides of the race in ``train.py``: each trains a model in a process of its own and notes when every step was done.

A side imports what it needs when it runs, as its users would: the time from process start to the first step is one of the figures.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from data import TRL_TEMPLATE, tokenizer_folder

LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIP = 3e-4, 0.1, (0.9, 0.95), 1.0
SEED = 1
IGNORED = -100  # what torch leaves out of a loss


class Shape(NamedTuple):
    """A GPT-2 with random weights, and the batches it is fed.

    Attributes:
        n_layer: Blocks.
        n_embd: Width.
        n_head: Heads of each block.
        vocab_size: Rows of the embedding; the tokenizer's own are among them.
        max_length: Tokens of a row, and positions of the model.
        batch_size: Rows of a batch.
        n_warmup: Steps that are not counted, at least 1.
        n_steps: Steps that are counted.
        precision: What every side runs in, 32 or bf16.
    """

    n_layer: int
    n_embd: int
    n_head: int
    vocab_size: int
    max_length: int
    batch_size: int
    n_warmup: int
    n_steps: int
    precision: str

    @property
    def architecture(self) -> dict[str, int]:
        """Settings of transformers' ``GPT2Config``; dropout stays at its 0.1."""
        sizes = {"n_layer": self.n_layer, "n_embd": self.n_embd, "n_head": self.n_head}
        return {**sizes, "vocab_size": self.vocab_size, "n_positions": self.max_length}


SHAPES = {
    "S": Shape(4, 256, 4, 8192, max_length=512, batch_size=8, n_warmup=3, n_steps=20, precision="32"),
    "M": Shape(12, 768, 12, 50257, max_length=512, batch_size=2, n_warmup=1, n_steps=4, precision="32"),
    "G": Shape(12, 768, 12, 50257, max_length=1024, batch_size=16, n_warmup=10, n_steps=40, precision="bf16"),  # for a GPU
}


class Job(NamedTuple):
    """What a side is to do.

    Attributes:
        shape: The model and its batches.
        precision: 32, or bf16 for mixed precision with weights in float32.
        n_steps: Optimizer steps in all.
        chats: A JSONL file in OpenAI's format; every chat has a reply.
        folder: Where the side writes.
    """

    shape: Shape
    precision: str
    n_steps: int
    chats: Path
    folder: Path

    @property
    def is_half(self) -> bool:
        """Whether matrices are multiplied in bfloat16."""
        return self.precision == "bf16"


class Clock:
    """Notes when each optimizer step was done and what was in its batch.

    Attributes:
        stamps: Seconds of the system's monotonic clock, which all processes share.
        batches: What was served; sides that fetch ahead have some more.
        peak: Bytes: of the GPU where there is one, else the highest resident size of the process, both until the last step.
    """

    def __init__(self) -> None:
        self.stamps: list[float] = []
        self.batches: list[dict[str, Any]] = []
        self.peak = 0

    def tick(self, batch: Any = None) -> None:
        """A step is done; its batch, unless that was noted when it was put together."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.stamps.append(time.monotonic())
        if batch is not None:
            self.batches.append(dict(batch))
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident


CLOCK = Clock()


def count(batch: dict[str, Any]) -> dict[str, int]:
    """Count a batch: the same way for every side.

    Returns: ``places`` (padding included), ``tokens`` (real ones), ``learnt`` (those with a label) and ``squares``: the sum of the
        squared lengths of the chats, which attention costs.
    """
    import torch

    ids = batch["input_ids"]
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    positions = torch.arange(ids.shape[1]).expand(ids.shape) if positions is None else positions
    is_real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    chat = (positions.to(ids.device) == 0).flatten().cumsum(0)  # a chat begins wherever positions begin anew
    lengths = torch.bincount(chat[is_real.flatten()])
    learnt = int((batch["labels"] != IGNORED).sum())
    return {"places": ids.numel(), "tokens": int(is_real.sum()), "learnt": learnt, "squares": int((lengths**2).sum())}


# Ours.


def on_batch_end(trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
    """What Lightning calls after each batch of ours; the config names it."""
    CLOCK.tick(batch)


def run_ours(job: Job, *, packing: bool = True, checkpointing: bool = False, hooks: dict[str, str] | None = None) -> None:
    """``lightning-chatgpt fit``, as from the command line.

    Args:
        job: What to do.
        packing: Whether chats share rows.
        checkpointing: Gradient checkpointing, as TRL has it on by default.
        hooks: Lightning's callback hooks, each with the dotted path of the function it calls.
    """
    from lightning_chatgpt.__main__ import main

    hooks = hooks or {"on_train_batch_end": f"{__name__}.on_batch_end"}
    config = {
        "seed_everything": SEED,
        "trainer": {
            "default_root_dir": str(job.folder / "run"),
            "accelerator": "auto",
            "devices": 1,
            "max_steps": job.n_steps,
            "precision": "bf16-mixed" if job.is_half else "32-true",
            "gradient_clip_val": CLIP,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": hooks}],
        },
        "model": {
            "architecture": job.shape.architecture,
            "learning_rate": LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY,
            "gradient_checkpointing": checkpointing,
        },
        "data": {
            "train": str(job.chats),
            "validation": None,
            "tokenizer": str(tokenizer_folder()),
            "batch_size": job.shape.batch_size,
            "max_length": job.shape.max_length,
            "packing": packing,
        },
        "samples": {"prompts": []},
        "checkpoint": {"save_last": False, "save_top_k": 0},  # written after the last step, which is not timed
    }
    path = job.folder / "fit.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    main(["fit", "-c", str(path), "--overwrite", "true"])


def run_bare(job: Job) -> None:
    """The same batches through transformers' GPT-2 in a plain loop: no Lightning, no logging."""
    import torch
    from torch.nn.functional import cross_entropy, pad
    from transformers import GPT2Config, GPT2LMHeadModel

    from lightning_chatgpt.data.chat import ChatDataModule

    tokenizer, shape = str(tokenizer_folder()), job.shape
    sizes = {"batch_size": shape.batch_size, "max_length": shape.max_length}
    data = ChatDataModule(train=str(job.chats), validation=None, tokenizer=tokenizer, packing=True, **sizes)
    data.setup("fit")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(SEED)
    model = GPT2LMHeadModel(GPT2Config(**shape.architecture, bos_token_id=None, eos_token_id=None)).to(device).train()
    decayed, others = ([p for p in model.parameters() if (p.ndim >= 2) is is_matrix] for is_matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job.n_steps)
    loader = data.train_dataloader()
    for _, batch in zip(range(job.n_steps), _endless(loader), strict=False):
        moved = {name: batch[name].to(device) for name in ("input_ids", "position_ids", "labels")}
        targets = pad(moved["labels"][:, 1:], (0, 1), value=IGNORED)
        is_learnt = targets != IGNORED
        with torch.autocast(device, dtype=torch.bfloat16, enabled=job.is_half):
            # No mask and no cache: only then does transformers keep chats apart by their positions.
            inputs = {"input_ids": moved["input_ids"], "position_ids": moved["position_ids"], "use_cache": False}
            logits = model(**inputs, logits_to_keep=is_learnt).logits  # (N, V)
        loss = cross_entropy(logits.float(), targets[is_learnt])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        CLOCK.tick(batch)


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


# The peers.


def run_hf(job: Job) -> None:
    """The ``Trainer`` of transformers: chats encoded by ``apply_chat_template`` in ``Dataset.map``, rows padded to the longest."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer, model = _peer_model(job)
    max_length = job.shape.max_length

    def encode(chats: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        settings = {"return_dict": True, "return_assistant_tokens_mask": True, "truncation": True, "max_length": max_length}
        encoded = tokenizer.apply_chat_template(chats["messages"], **settings)
        rows = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        labels = [[i if is_learnt else IGNORED for i, is_learnt in zip(*row, strict=True)] for row in rows]
        return {"input_ids": encoded["input_ids"], "labels": labels}

    dataset = _peer_chats(job).map(encode, batched=True, remove_columns=["messages"])
    dataset = dataset.filter(lambda row: any(label != IGNORED for label in row["labels"]))  # as TRL does
    collator = DataCollatorForSeq2Seq(tokenizer)  # pads labels, too
    args = TrainingArguments(**_peer_arguments(job))
    _train(Trainer(model, args=args, train_dataset=dataset, data_collator=collator, processing_class=tokenizer))


def run_trl(job: Job, *, packing: bool = False, checkpointing: bool = True) -> None:
    """TRL's ``SFTTrainer`` with ``assistant_only_loss``.

    Args:
        job: What to do.
        packing: Its default strategy, ``bfd``: chats are packed, what is too long for a row is dropped, and a batch is laid out as one
            row, which FlashAttention would split again. Without it, attention goes over the whole row under a mask.
        checkpointing: Gradient checkpointing, on unless one says otherwise: less memory, and each block is computed twice.
    """
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    has_flash = job.is_half and find_spec("flash_attn") is not None  # it takes half precision on a GPU only
    tokenizer, model = _peer_model(job, **({"attn_implementation": "flash_attention_2"} if packing and has_flash else {}))
    settings = {"assistant_only_loss": True, "max_length": job.shape.max_length, "packing": packing}
    args = SFTConfig(**_peer_arguments(job), **settings, gradient_checkpointing=checkpointing)
    _train(SFTTrainer(model, args=args, train_dataset=_peer_chats(job), processing_class=tokenizer))


def _peer_model(job: Job, **settings: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, set_seed

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder())
    tokenizer.chat_template = TRL_TEMPLATE
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    set_seed(SEED)
    return tokenizer, AutoModelForCausalLM.from_config(GPT2Config(**job.shape.architecture, **ends), **settings)


def _peer_chats(job: Job) -> Any:
    from datasets import load_dataset

    return load_dataset("json", data_files=str(job.chats), split="train")


def _peer_arguments(job: Job) -> dict[str, Any]:
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(job.folder / "run"),
        "per_device_train_batch_size": job.shape.batch_size,
        "max_steps": job.n_steps,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "adam_beta2": BETAS[1],
        "max_grad_norm": CLIP,
        "lr_scheduler_type": "cosine",
        "bf16": job.is_half,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
    }


def _train(trainer: Any) -> None:
    from transformers import TrainerCallback

    class StepEnd(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            CLOCK.tick()

    collate = trainer.data_collator

    def collate_and_note(rows: list[Any]) -> Any:
        batch = collate(rows)
        CLOCK.batches.append(dict(batch))
        return batch

    trainer.data_collator = collate_and_note
    trainer.add_callback(StepEnd())
    trainer.train()


SIDES: dict[str, Callable[[Job], None]] = {
    "ours": run_ours,
    "ours-checkpointed": partial(run_ours, checkpointing=True),
    "hf": run_hf,
    "trl": run_trl,
    "trl-stored": partial(run_trl, checkpointing=False),
    "trl-packed": partial(run_trl, packing=True, checkpointing=False),
    "ours-padded": partial(run_ours, packing=False),
    "bare": run_bare,
}
