"""What it costs that nothing is lost: training steps with the parts that guard a run beside the same without, saves beside Lightning's.

    python benchmarks/safety.py steps --shape tiny S    # tiny: 1 layer × 32, where a step is next to nothing; S: 4 layers × 256
    python benchmarks/safety.py saves                   # GPT-2 with 124 million parameters and both of AdamW's moments, 1.5 GB

The sides take turns in one process: the same module and data in a Trainer with ``RunCheckpoint``, ``ExactResume``, ``NonFiniteGuard``,
``GracefulStop`` and ``ProcessWatch``, and in one with none of them, without a validation or a save; and checkpoints written and read by
``DurableCheckpointIO``, which forces them to the disk and seals them, and by Lightning's ``TorchCheckpointIO``, which leaves them in
the system's memory. Needs the extra ``corpora``. Tables are Markdown, for a page of results.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from data import _machine
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from train import write_chats
from train_sides import SHAPES, Shape

from lightning_chatgpt import (
    CausalLMModule,
    ChatDataModule,
    DurableCheckpointIO,
    ExactResume,
    GracefulStop,
    NonFiniteGuard,
    ProcessWatch,
    RunCheckpoint,
)

TINY = Shape(1, 32, 2, 8192, max_length=64, batch_size=1, n_warmup=20, n_steps=300, precision="32")
PARAMETERS = 124_439_808


class Clock(Callback):
    """Notes when each step was done."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """One is done, and what follows it."""
        self.stamps.append(time.perf_counter())


def seconds_a_step(shape: Shape, chats: Path, folder: Path, *, is_safe: bool) -> float:
    """Train, and take the median of the counted steps."""
    clock = Clock()
    guards = [RunCheckpoint(), ExactResume(), NonFiniteGuard(), GracefulStop(), ProcessWatch()] if is_safe else []
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_steps=shape.n_warmup + shape.n_steps,
        callbacks=[*guards, clock],
        enable_checkpointing=is_safe,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    data = ChatDataModule(
        train=str(chats),
        vocab_size=shape.vocab_size,
        max_length=shape.max_length,
        batch_size=shape.batch_size,
        packing=True,
        validation=None,
    )
    trainer.fit(CausalLMModule(architecture=shape.architecture), data)
    stamps = clock.stamps[shape.n_warmup :]
    return statistics.median(after - before for before, after in pairwise(stamps))


def steps(args: argparse.Namespace) -> None:
    """Race the two Trainers."""
    print("| shape | guarded, ms a step | bare, ms a step | guarded / bare | more, ms |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chats = write_chats(folder / "chats.jsonl")
        for shape_name in args.shape:
            shape = {"tiny": TINY, **SHAPES}[shape_name]
            found: dict[bool, list[float]] = {True: [], False: []}
            for turn in range(args.repetitions):
                for is_safe in (True, False) if turn % 2 else (False, True):
                    found[is_safe].append(1000 * seconds_a_step(shape, chats, folder, is_safe=is_safe))
            guarded, bare = (statistics.median(values) for values in found.values())
            print(f"| {shape_name} | {_spread(found[True])} | {_spread(found[False])} | {guarded / bare:.3f} | {guarded - bare:.2f} |")


def saves(args: argparse.Namespace) -> None:
    """Race the two ways of writing and reading."""
    names = ("weights", "first moments", "second moments")
    checkpoint = {name: {str(i): torch.randn(PARAMETERS // 100) for i in range(100)} for name in names}
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        sides = [DurableCheckpointIO(), TorchCheckpointIO()]
        for turn in range(args.repetitions):
            for io in sides[:: -1 if turn % 2 else 1]:
                path = Path(name) / "last.ckpt"
                start = time.perf_counter()
                io.save_checkpoint(checkpoint, path)
                saved = time.perf_counter()
                io.load_checkpoint(path, weights_only=True)
                loaded = time.perf_counter()
                found.setdefault((type(io).__name__, "save"), []).append(saved - start)
                found.setdefault((type(io).__name__, "load"), []).append(loaded - saved)
                path.unlink()
    print("| of 1.5 GB | DurableCheckpointIO, s | TorchCheckpointIO, s | ratio |\n| --- | --- | --- | --- |")
    for what in ("save", "load"):
        ours, theirs = (found[name, what] for name in ("DurableCheckpointIO", "TorchCheckpointIO"))
        print(f"| {what} | {_spread(ours)} | {_spread(theirs)} | {statistics.median(ours) / statistics.median(theirs):.2f} |")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("steps", help="what a step costs")
    one.add_argument("--shape", nargs="+", default=["tiny", "S"], choices=["tiny", *SHAPES])
    one.set_defaults(function=steps)
    other = commands.add_parser("saves", help="what a save and a load cost")
    other.add_argument("--folder", type=Path, help="on the disk that is asked about; the system's temporary one by itself")
    other.set_defaults(function=saves)
    for command in (one, other):
        command.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    args.function(args)
    print(f"\n{_machine('torch', 'lightning')}")


if __name__ == "__main__":
    main()
