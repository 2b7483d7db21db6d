"""How fast, how soon and in how much memory a model is trained on chats, beside transformers' Trainer, TRL and a bare loop.

    python benchmarks/train.py run --shape S M --repetitions 3      # S: 4 layers × 256; M: GPT-2 with 124 million parameters
    python benchmarks/train.py run --shape G --json train.json      # the same GPT-2 on a GPU
    python benchmarks/train.py side ours --shape S                  # one side by itself; prints what it noted as JSON
    python benchmarks/train.py profile --shape S                    # where a step of ours spends its time

Every side trains a GPT-2 of the same shape from scratch on the 4,017 chitchat conversations that have a reply (TRL refuses the others),
with the assistant's words learnt, dropout 0.1, AdamW, clipping at 1 and a cosine schedule. Each runs in a process of its own, one after
the other, in turns; by itself it chooses what it does with chats that are longer or shorter than a row:

- ``ours``: ``lightning-chatgpt fit`` with ``data.packing: true``; ``ours-checkpointed`` with ``model.gradient_checkpointing`` besides;
  ``ours-padded`` without packing.
- ``bare``: ours' batches through transformers' GPT-2 in a plain loop of torch, the head at supervised positions only.
- ``hf``: transformers' ``Trainer``, rows padded to the longest of a batch.
- ``trl``: ``SFTTrainer(assistant_only_loss=True)`` as it comes, padded, with the gradient checkpointing that it turns on; ``trl-stored``
  with that turned off; ``trl-packed`` with that turned off and packing on (by FlashAttention where it is installed).

Tokens are real ones, without padding, and tokens/s are all of the counted steps' over all of their time. What is counted of the cost of
a step is, for every side, only what cannot be left out, so that shares of the machine's matmul peak compare:

    6 (12 L D² T + V D S) + 6 L D Σn²

with L layers of width D (12 D² are the matrices of a block), T real tokens, the head's V × D matrix at the S supervised tokens, and
causal attention within chats of n tokens: 2 D n² forward in each layer, and twice that backward. Embeddings are looked up, which costs
nothing. The peak is that of multiplying square matrices, measured before each turn.

Start is the time from the parent's call to the end of the first optimizer step: cold with an empty cache, warm with the cache that the
cold start left. Peak memory is the process's resident size (on a GPU: what torch allocated there) up to the last step, with a warm cache.

Needs the extra ``corpora``, and TRL (``pip install -c constraints.txt -e '.[corpora]' trl``). Nothing is fetched. Tables are Markdown, for
a page of results.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from data import MIB, _machine, read_chitchat
from train_sides import CLOCK, SHAPES, SIDES, Job, Shape, count, run_ours

DTYPES = {"32": "float32", "bf16": "bfloat16"}
GOALS: dict[tuple[str, str], dict[str, float]] = {  # of ours to the peer's; speeds at least, the others at most
    ("S", "hf"): {"speed": 2.0, "speed bf16": 3.3, "cold": 0.7, "warm": 0.6, "peak": 0.7},
    ("S", "trl"): {"speed": 3.5, "speed bf16": 5.5, "cold": 0.5, "warm": 0.5, "peak": 0.5},
    ("S", "bare"): {"speed": 0.95},
    ("M", "hf"): {"speed bf16": 2.5, "cold": 0.7, "warm": 0.6, "peak": 0.8},
    ("M", "trl"): {"speed bf16": 3.0, "cold": 0.5, "warm": 0.5, "peak": 0.7},
}
Figures = dict[str, list[float]]  # of one side in one precision, a value for each repetition
Entry = tuple[str, str]  # a side and its precision


# One side, in a process of its own.


def write_chats(path: Path) -> Path:
    """Write the conversations that have a reply as JSONL."""
    chats = [chat for chat in read_chitchat() if any(message["role"] == "assistant" for message in chat)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    return path


def prepare_job(args: argparse.Namespace, folder: Path) -> Job:
    """The job that the command line describes, with every cache in ``folder``; call it before anything heavy is imported."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(LIGHTNING_CHATGPT_CACHE=str(folder / "cache"), HF_DATASETS_CACHE=str(folder / "cache"))
    shape = SHAPES[args.shape]
    n_steps = args.steps or shape.n_warmup + shape.n_steps
    chats = args.chats or write_chats(folder / "chats.jsonl")
    return Job(shape, args.precision or shape.precision, n_steps, chats, folder)


def side(args: argparse.Namespace) -> None:
    """Train, and print what was noted as one line of JSON."""
    with tempfile.TemporaryDirectory() as name:
        SIDES[args.name](prepare_job(args, args.folder or Path(name)))
        counts = [count(batch) for batch, _ in zip(CLOCK.batches, CLOCK.stamps, strict=False)]
    start, *_ = stamps = [stamp - args.spawned for stamp in CLOCK.stamps]
    print(json.dumps({"start": start, "stamps": stamps, "peak": CLOCK.peak, "counts": counts}))


def probe(args: argparse.Namespace) -> None:
    """Print as JSON how many floating-point operations a second the machine multiplies matrices with, and on which device."""
    import torch

    on_gpu = torch.cuda.is_available()
    size, device = (8192, "cuda") if on_gpu else (2048, "cpu")
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if on_gpu else "cpu"}
    for precision, name in DTYPES.items():
        a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, name)) for _ in range(2))
        seconds = []
        for _ in range(12):
            start = time.perf_counter()
            torch.mm(a, b)
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        found[precision] = 2 * size**3 / statistics.median(seconds[2:])
    print(json.dumps(found))


# The race.


class ChildError(Exception):
    """A command of this script ended badly in its process; says how."""


def spawn(*arguments: str) -> dict[str, Any]:
    """Run a command of this script in a fresh process.

    Returns: what it printed last.

    Raises:
        ChildError: It did not get there.
    """
    errors = Path(tempfile.gettempdir()) / f"train-{'-'.join(arguments[:2])}.stderr"
    command = [sys.executable, __file__, *arguments]
    if arguments[0] == "side":
        command += ["--spawned", repr(time.monotonic())]
    with errors.open("w") as file:
        child = subprocess.run(command, stdout=subprocess.PIPE, stderr=file, text=True)
    if child.returncode:
        tail = "\n".join(errors.read_text().splitlines()[-20:])
        raise ChildError(f"{tail}\n{' '.join(command)} ended with {child.returncode}; all of what it said is in {errors}")
    errors.unlink()
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


def plan(shape: Shape, sides: Iterable[str], *, peers_bf16: bool) -> list[Entry]:
    """What is run in a turn: every side in the shape's precision, and some in bf16 besides."""
    entries: dict[Entry, None] = {}
    for name in sides:
        entries[name, shape.precision] = None
        if name in ("ours", "bare") or (peers_bf16 and name.startswith(("hf", "trl"))):
            entries[name, "bf16"] = None
    return list(entries)


def add_figures(figures: Figures, found: dict[str, Any], shape: Shape, *, peak_flops: float) -> None:
    """Add a value to each figure of a side.

    Args:
        figures: Where to: ``speed`` and ``learnt`` (tokens a second), ``padding``, ``peak`` (bytes), ``share`` of the matmul peak, ``step``
            (median seconds), ``warm`` and, if there was one, ``cold`` start (seconds).
        found: As :func:`run_entry` gives it.
        shape: What it trained.
        peak_flops: Floating-point operations a second of the matmul peak.
    """
    stamps, counts = found["stamps"][shape.n_warmup - 1 :], found["counts"][shape.n_warmup :]
    seconds = stamps[-1] - stamps[0]
    total = {name: sum(count[name] for count in counts) for name in counts[0]}
    body, head = 12 * shape.n_layer * shape.n_embd**2, shape.vocab_size * shape.n_embd
    flops = 6 * (body * total["tokens"] + head * total["learnt"]) + 6 * shape.n_layer * shape.n_embd * total["squares"]
    values = {
        "speed": total["tokens"] / seconds,
        "learnt": total["learnt"] / seconds,
        "padding": 1 - total["tokens"] / total["places"],
        "peak": found["peak"],
        "share": flops / seconds / peak_flops,
        "step": statistics.median(after - before for before, after in pairwise(stamps)),
        "warm": found["start"],
        **({"cold": found["cold"]} if "cold" in found else {}),
    }
    for name, value in values.items():
        figures.setdefault(name, []).append(value)


def run(args: argparse.Namespace) -> None:
    """Run the sides in turns and print the tables."""
    if args.steps is not None and args.steps < 1:
        raise SystemExit("--steps: at least one step has to be counted")
    # What is on the disk only is slow for whoever reads it first.
    subprocess.run([sys.executable, "-c", "import lightning_chatgpt.cli, trl.trainer.sft_trainer"], check=True, capture_output=True)
    record: dict[str, Any] = {"command": sys.argv[1:], "machine": _machine("torch", "lightning", "transformers", "trl", "datasets").strip()}
    record["probes"], record["runs"] = [], []
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chats = write_chats(folder / "chats.jsonl")
        for shape_name in args.shape:
            shape = SHAPES[shape_name]._replace(**({"n_steps": args.steps} if args.steps else {}))
            figures: dict[Entry, Figures] = {}
            for number in range(args.repetitions):
                probed = spawn("probe")
                record["probes"].append(probed)
                if shape_name == "G" and probed["device"] == "cpu":
                    raise SystemExit("--shape G needs a GPU")
                for entry in plan(shape, args.sides, peers_bf16=args.peers_bf16):
                    title = f"{shape_name} {number + 1}/{args.repetitions} {' '.join(entry)}"
                    try:
                        found = run_entry(entry, shape_name, shape, chats, folder / f"{shape_name}-{number}-{entry[0]}")
                    except ChildError as error:  # hours of the others' figures are not to be lost by it
                        failed.append(title)
                        print(f"{title}: {error}", file=sys.stderr)
                        continue
                    of_side = figures.setdefault(entry, {})
                    add_figures(of_side, found, shape, peak_flops=probed[entry[1]])
                    record["runs"].append({"shape": shape_name, "repetition": number, "side": entry[0], "precision": entry[1], **found})
                    if args.json:
                        Path(args.json).write_text(json.dumps(record))
                    print(f"{title}: {of_side['speed'][-1]:,.0f} tokens/s, first step after {found['start']:.1f} s", file=sys.stderr)
            print_figures(shape_name, shape, figures)
            print_ratios(shape_name, shape, figures)
    for precision, name in DTYPES.items():
        peaks = [probed[precision] / 1e9 for probed in record["probes"]]
        print(f"\nMatmul peak in {name} on {record['probes'][0]['device']}: {_spread(peaks, ',.0f')} GFLOP/s.", end="")
    print(f"\n\n`python benchmarks/train.py {' '.join(sys.argv[1:])}`\n\n{record['machine']}")
    if failed:
        raise SystemExit(f"without: {', '.join(failed)}")


def run_entry(entry: Entry, shape_name: str, shape: Shape, chats: Path, folder: Path) -> dict[str, Any]:
    """Run a side with a warm cache, and before that with a cold one, unless this turn has done so.

    Returns: what it printed, and ``cold``, the cold start in seconds.
    """
    name, precision = entry
    is_cold = not folder.exists()

    def train(n_steps: int) -> dict[str, Any]:
        settings = ["--shape", shape_name, "--precision", precision, "--steps", str(n_steps)]
        found = spawn("side", name, *settings, "--chats", str(chats), "--folder", str(folder))
        shutil.rmtree(folder / "run", ignore_errors=True)
        return found

    cold = {"cold": train(1)["start"]} if is_cold else {}
    return {**train(shape.n_warmup + shape.n_steps), **cold}


def print_figures(shape_name: str, shape: Shape, figures: dict[Entry, Figures]) -> None:
    """Print a row for each side: medians, and from where to where they range."""
    sizes = f"{shape.n_layer} layers × {shape.n_embd}, vocabulary {shape.vocab_size:,}, {shape.batch_size} rows of {shape.max_length}"
    print(f"\nShape {shape_name}: {sizes}; {shape.n_steps} steps counted after {shape.n_warmup}.\n")
    print("| side | real tokens/s | learnt tokens/s | padding | s a step | peak MiB | of matmul peak | start cold, s | start warm, s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for (name, precision), of_side in figures.items():
        peak = _spread([value / MIB for value in of_side["peak"]], ",.0f")
        cells = [_spread(of_side["speed"], ",.0f"), f"{statistics.median(of_side['learnt']):,.0f}"]
        cells += [f"{statistics.median(of_side['padding']):.0%}", f"{statistics.median(of_side['step']):.2f}", peak]
        cells += [f"{statistics.median(of_side['share']):.2f}", _spread(of_side.get("cold", []), ".1f"), _spread(of_side["warm"], ".1f")]
        print(f"| {name}, {precision} | {' | '.join(cells)} |")


def print_ratios(shape_name: str, shape: Shape, figures: dict[Entry, Figures]) -> None:
    """Print a row for each peer: ours over the peer's, beside the goal where there is one."""
    print(f"\n| ours over theirs | tokens/s, ours in {shape.precision} | ours in bf16 | start cold | start warm | peak memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    columns = {"speed": shape.precision, "speed bf16": "bf16", "cold": shape.precision, "warm": shape.precision, "peak": shape.precision}
    peers = [entry for entry in figures if not entry[0].startswith("ours")]
    # TRL computes activations again unless it is told not to: ours does the same in a row of its own.
    pairs = [("ours", peer) for peer in peers] + [("ours-checkpointed", peer) for peer in peers if peer[0] == "trl"]
    for own, (name, precision) in pairs:
        if (own, shape.precision) not in figures:
            continue
        cells = []
        for column, our_precision in columns.items():
            metric = column.split()[0]
            ours, theirs = figures.get((own, our_precision), {}).get(metric), figures[name, precision].get(metric)
            goal = GOALS.get((shape_name, name), {}).get(column) if precision == shape.precision else None
            wanted = f" ({'≥' if metric == 'speed' else '≤'} {goal})" if goal is not None else ""
            cells.append(f"{statistics.median(ours) / statistics.median(theirs):.2f}{wanted}" if ours and theirs else "–")
        print(f"| {own} / {name}, {precision} | {' | '.join(cells)} |")


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    median = f"{statistics.median(values):{form}}"
    return f"{median} ({min(values):{form}}–{max(values):{form}})" if len(values) > 1 else median


# Profile.


class StepProfiler:
    """Follows some steps of ours with torch's profiler, and as many after them with Python's.

    Attributes:
        n_warmup: Steps that are let pass.
        n_steps: Steps that each follows.
        seconds: What the steps took that each followed.
    """

    def __init__(self) -> None:
        self.n_warmup = self.n_steps = 0
        self.seconds: list[float] = []
        self.torch_profiler: Any = None
        self.python_profiler = cProfile.Profile()
        self._began = 0.0

    def step(self, number: int) -> None:
        """A step begins: start and stop what is to be."""
        from torch.profiler import profile

        turn, rest = divmod(number - self.n_warmup, self.n_steps)
        if rest or turn not in (0, 1, 2):
            return
        if turn:
            self.seconds.append(time.perf_counter() - self._began)
        if turn == 0:
            self.torch_profiler = profile(record_shapes=True)
            self.torch_profiler.start()
        elif turn == 1:
            self.torch_profiler.stop()
            self.python_profiler.enable()
        else:
            self.python_profiler.disable()
        self._began = time.perf_counter()


PROFILER = StepProfiler()


def on_train_batch_start(trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
    """What Lightning calls before each batch."""
    PROFILER.step(batch_idx)


def on_before_optimizer_step(trainer: Any, module: Any, optimizer: Any) -> None:
    """What Lightning calls when gradients are there and not clipped yet; the optimizer's own record holds forward and backward, too."""
    _mark("mark optimizer")


def on_train_batch_end(trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
    """What Lightning calls when the weights are changed."""
    _mark("mark end")


def _mark(name: str) -> None:
    from torch.profiler import record_function

    with record_function(name):
        pass


def kind_of(event: Any, shape: Shape) -> str | None:
    """What an operation belongs to, told by its name and the shapes of its inputs; None where neither tells."""
    dims = [dims for dims in event.input_shapes or [] if isinstance(dims, list)]
    if any(word in event.name for word in ("scaled_dot_product", "flash", "_softmax")) and "log_softmax" not in event.name:
        return "attention"
    if any(word in event.name for word in ("log_softmax", "nll_loss", "cross_entropy")) or any(shape.vocab_size in d for d in dims):
        return "head and loss"
    if "bmm" in event.name or any(len(d) == 4 and d[2] == d[3] for d in dims):
        return "attention"
    return "other matrices" if event.name.rpartition("::")[2] in ("mm", "addmm", "linear", "mkldnn_linear") else None


def shares_of(events: Iterable[Any], shape: Shape) -> dict[str, float]:
    """Seconds of their own that operations took (on a GPU: their kernels), by what they belong to."""
    import torch
    from torch.autograd import DeviceType

    on_gpu = torch.cuda.is_available()
    shares: dict[str, float] = {}
    is_optimizer = False
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.name.startswith("mark "):
            is_optimizer = event.name == "mark optimizer"
        if "::" not in event.name or event.name.startswith("autograd::") or event.device_type != DeviceType.CPU:
            continue  # a mark, the engine, or a kernel, whose time its operation has
        kind, caller = kind_of(event, shape), event.cpu_parent
        while kind is None and caller is not None:  # an operation inside another belongs with it
            kind, caller = kind_of(caller, shape), caller.cpu_parent
        kind = "optimizer and clipping" if is_optimizer else kind or "other operations"
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        shares[kind] = shares.get(kind, 0.0) + microseconds / 1e6
    return shares


def python_seconds(profiler: cProfile.Profile) -> dict[str, float]:
    """Seconds of their own that Python's functions took, by package; what is written in C is left out."""
    seconds: dict[str, float] = {}
    for (file, _, _), (_, _, own, _, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        package = next((name for name in ("lightning_chatgpt", "lightning", "transformers", "torch") if f"/{name}/" in file), "others")
        if file != "~":
            seconds[package] = seconds.get(package, 0.0) + own
    return seconds


def profile(args: argparse.Namespace) -> None:
    """Print where the time of our steps goes."""
    import torch

    shape = SHAPES[args.shape]
    PROFILER.n_warmup, PROFILER.n_steps = shape.n_warmup, args.profiled
    args.steps = shape.n_warmup + 2 * args.profiled + 1
    with tempfile.TemporaryDirectory() as name:
        hooks = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")
        run_ours(prepare_job(args, Path(name)), hooks={hook: f"{__name__}.{hook}" for hook in hooks})
    wall, python_wall = PROFILER.seconds
    shares = shares_of(PROFILER.torch_profiler.events(), shape)
    shares["Python, autograd, waiting"] = wall - sum(shares.values())
    print(f"\n| {args.profiled} steps of ours under torch's profiler | s a step | share |\n| --- | --- | --- |")
    for kind, seconds in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"| {kind} | {seconds / args.profiled:.4f} | {seconds / wall:.1%} |")
    print(f"| together | {wall / args.profiled:.4f} | |")
    print(f"\n| {args.profiled} steps under Python's: own time of functions in Python | s a step | share |\n| --- | --- | --- |")
    for package, seconds in sorted(python_seconds(PROFILER.python_profiler).items(), key=lambda item: -item[1]):
        print(f"| {package} | {seconds / args.profiled:.4f} | {seconds / python_wall:.1%} |")
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(f"\n{PROFILER.torch_profiler.key_averages().table(sort_by=key, row_limit=args.top, max_name_column_width=50)}")
    print(_machine("torch", "lightning", "transformers"))


def main() -> None:
    """Read the command line and run what it names."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # with more, TRL refuses and transformers splits the batch
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="{run,side,profile}")

    command = commands.add_parser("run", help="all sides in turns, and the tables")
    command.add_argument("--shape", nargs="+", choices=SHAPES, default=["S"], help="what is trained (default: S)")
    command.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="who takes part (default: all)")
    command.add_argument("--repetitions", type=int, default=3, help="turns (default: %(default)s)")
    command.add_argument("--steps", type=int, help="steps that are counted, to try it out (default: 20 for S, 4 for M, 40 for G)")
    command.add_argument("--peers_bf16", action="store_true", help="run the peers in bf16, too")
    command.add_argument("--json", help="a file for all that was measured")
    command.set_defaults(run=run)

    command = commands.add_parser("side", help="one side by itself")
    command.add_argument("name", choices=SIDES)
    command.add_argument("--steps", type=int, help="steps in all (default: as run makes)")
    command.add_argument("--chats", type=Path, help="a JSONL file (default: chitchat's)")
    command.add_argument("--folder", type=Path, help="where caches lie (default: a temporary one)")
    command.add_argument("--spawned", type=float, default=time.monotonic(), help="when the process was started, by the monotonic clock")
    command.set_defaults(run=side)
    _add_model(command)

    command = commands.add_parser("profile", help="where a step of ours spends its time")
    command.add_argument("--profiled", type=int, default=5, help="steps that each profiler follows (default: %(default)s)")
    command.add_argument("--top", type=int, default=20, help="how many operations are listed (default: %(default)s)")
    command.set_defaults(run=profile, chats=None)
    _add_model(command)

    commands.add_parser("probe").set_defaults(run=probe)  # a part of run, in a process of its own

    args = parser.parse_args()
    args.run(args)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--shape", choices=SHAPES, default="S", help="what is trained (default: %(default)s)")
    command.add_argument("--precision", choices=DTYPES, help="default: the shape's, 32 for S and M, bf16 for G")


if __name__ == "__main__":
    main()
