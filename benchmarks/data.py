"""How fast conversations become packed, masked examples, beside TRL and the bare tokenizer; and in how much memory.

    python benchmarks/data.py speed                                      # chitchat: ours, TRL's, the tokenizer alone; 5 minutes
    python benchmarks/data.py memory --gigabytes 2 --folder /big/disk    # peak memory at 0.25, 0.5, 1 and 2 GB; about half an hour
    python benchmarks/data.py profile                                    # where the time of a cold set-up goes

Needs the extras ``corpora`` and, for ``speed``, ``dev`` (TRL). Nothing is fetched. Tables are Markdown, for a page of results.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import logging
import os
import platform
import pstats
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

MAX_LENGTH = 512
SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)  # of --gigabytes
SAMPLE_SECONDS = 0.2
MIB = 1 << 20
Chat = list[dict[str, str]]  # messages in OpenAI's format

# The shipped template is CHATML_JINJA; TRL finds the assistant's tokens by {% generation %}, which has to stand in the template,
# and has no training template of its own for this one. What is written and what is learnt is the same.
TRL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
)


class Result(NamedTuple):
    """What one run of a side gave.

    Attributes:
        seconds: How long it took.
        n_tokens: Tokens in its examples.
        n_learnt: How many of them count in the loss; -1 where the side tells no such thing.
        n_rows: Packed rows of up to MAX_LENGTH; -1 likewise.
    """

    seconds: float
    n_tokens: int
    n_learnt: int = -1
    n_rows: int = -1


# Data.


def read_chitchat() -> list[Chat]:
    """All of chitchat, from the package's raw file.

    What one sender says in a row is one message, joined by line breaks; who speaks first is the user. Blank utterances are left out.
    """
    spec = find_spec("chitchat_dataset")
    if spec is None or spec.origin is None:
        raise SystemExit("chitchat is not installed: pip install 'lightning-chatgpt[corpora]'")
    records = json.loads((Path(spec.origin).parent / "dataset.json").read_text(encoding="utf-8"))
    chats = []
    for record in records.values():
        turns: list[tuple[str, list[str]]] = []
        for utterance in (utterance for block in record["messages"] for utterance in block):
            text = utterance["text"].strip()
            if text and turns and turns[-1][0] == utterance["sender"]:
                turns[-1][1].append(text)
            elif text:
                turns.append((utterance["sender"], [text]))
        if turns:
            roles = ("user" if sender == turns[0][0] else "assistant" for sender, _ in turns)
            chats.append([{"role": role, "content": "\n".join(texts)} for role, (_, texts) in zip(roles, turns, strict=True)])
    return chats


def tokenizer_folder() -> Path:
    """The folder of ``builtin:smalltalk``."""
    spec = find_spec("lightning_chatgpt")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "base" / "smalltalk"


def load_tokenizer() -> Any:
    """The built-in tokenizer, anew: it remembers words, and no run is to profit from another."""
    from lightning_chatgpt.chat.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer_folder())


# The sides of the race.


def run_ours(chats: Sequence[Any]) -> Result:
    """Ids, loss weights and packed rows, in memory."""
    from lightning_chatgpt.chat.encoding import Encoder
    from lightning_chatgpt.data.packing import pack

    encoder = Encoder(load_tokenizer(), max_length=MAX_LENGTH, truncation="split")
    start = time.perf_counter()
    examples = [example for chat in encoder.encode(chats) for example in chat.examples]
    rows = pack([len(example.input_ids) for example in examples], capacity=MAX_LENGTH)
    seconds = time.perf_counter() - start
    n_tokens = sum(len(example.input_ids) for example in examples)
    n_learnt = sum(1 for example in examples for weight in example.loss_weights if weight)
    return Result(seconds, n_tokens, n_learnt, len(rows))


def run_ours_on_disk(chats: Sequence[Any]) -> Result:
    """The same by way of an Arrow file in a fresh folder, as the data module does; TRL's result is an Arrow table, too."""
    import numpy as np

    from lightning_chatgpt.chat.encoding import Encoder
    from lightning_chatgpt.data.packing import pack
    from lightning_chatgpt.data.tables import TokenTable

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chitchat.tokens.arrow"
        encoder = Encoder(load_tokenizer(), max_length=MAX_LENGTH, truncation="split")
        start = time.perf_counter()
        TokenTable.write(path, ((i, chat.examples) for i, chat in enumerate(encoder.encode(chats))), dict)
        table = TokenTable(path)
        rows = pack(table.lengths, capacity=MAX_LENGTH)
        seconds = time.perf_counter() - start
        n_learnt = sum(int(np.count_nonzero(table.example(i)[1])) for i in range(len(table)))
        return Result(seconds, int(table.lengths.sum()), n_learnt, len(rows))


def run_bare(texts: list[str]) -> Result:
    """The tokenizer alone, over each conversation written as one string; no masks, no rows."""
    backend = load_tokenizer().backend_tokenizer
    start = time.perf_counter()
    encodings = backend.encode_batch(texts, add_special_tokens=False)
    seconds = time.perf_counter() - start
    return Result(seconds, sum(map(len, encodings)))


class Trl:
    """TRL's SFTTrainer around a model that is next to nothing, for its way of preparing a data set.

    Args:
        chats: What is prepared; every one of them needs a reply.
    """

    def __init__(self, chats: Sequence[Chat]) -> None:
        import datasets

        datasets.disable_caching()  # or the second run would find the first one's files
        datasets.disable_progress_bars()
        logging.getLogger("trl").setLevel(logging.ERROR)
        self.dataset = datasets.Dataset.from_list([{"messages": chat} for chat in chats])

    def run(self, strategy: str) -> Result:
        """Ids, labels and packed rows as ``SFTTrainer`` makes them in one process; an Arrow table in memory."""
        trainer, tokenizer = self._trainer(packing=True, packing_strategy=strategy)
        start = time.perf_counter()
        rows = trainer._prepare_dataset(self.dataset, tokenizer, trainer.args, True, None, "train")
        seconds = time.perf_counter() - start
        n_learnt = sum(sum(label != -100 for label in row) for row in rows["labels"])
        return Result(seconds, sum(map(len, rows["input_ids"])), n_learnt, len(rows))

    def examples(self, numbers: Sequence[int]) -> list[tuple[list[int], list[bool]]]:
        """Ids of some conversations, whole and not packed, and for each id whether it is learnt."""
        trainer, tokenizer = self._trainer(max_length=None)
        rows = trainer._prepare_dataset(self.dataset.select(numbers), tokenizer, trainer.args, False, None, "train")
        return [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in rows]

    def _trainer(self, **settings: Any) -> tuple[Any, Any]:
        from transformers import GPT2Config, GPT2LMHeadModel
        from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

        tokenizer = load_tokenizer()
        tokenizer.chat_template = TRL_TEMPLATE
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=MAX_LENGTH, n_embd=8, n_layer=1, n_head=1)
        chosen: dict[str, Any] = {"max_length": MAX_LENGTH, "dataset_num_proc": None, **settings}
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args = SFTConfig(output_dir=folder, assistant_only_loss=True, report_to="none", use_cpu=True, bf16=False, **chosen)
            model = GPT2LMHeadModel(config)
            return SFTTrainer(model, args=args, train_dataset=self.dataset.select(range(2)), processing_class=tokenizer), tokenizer


def count_equal(trl: Trl, chats: Sequence[Any], numbers: Sequence[int]) -> tuple[int, int]:
    """How many conversations have the same ids as TRL's, and how many the same tokens learnt, too; nothing is truncated."""
    from lightning_chatgpt.chat.encoding import Encoder

    encoder = Encoder(load_tokenizer(), max_length=1 << 30)
    ours = [chat.examples[0] for chat in encoder.encode([chats[i] for i in numbers])]
    same_ids = same_both = 0
    for example, (ids, learnt) in zip(ours, trl.examples(numbers), strict=True):
        same_ids += example.input_ids == ids
        same_both += example.input_ids == ids and [weight > 0 for weight in example.loss_weights] == learnt
    return same_ids, same_both


def speed(args: argparse.Namespace) -> None:
    """Run the sides in turns and print the table."""
    from lightning_chatgpt.chat.conversation import Conversation

    everything = read_chitchat()[: args.conversations]
    trainable = [chat for chat in everything if any(message["role"] == "assistant" for message in chat)]
    all_chats, chats = ([Conversation.from_record(_record(chat)) for chat in some] for some in (everything, trainable))
    tokenizer = load_tokenizer()
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in trainable]
    trl = Trl(trainable)

    numbers = random.Random(0).sample(range(len(chats)), min(args.check, len(chats)))
    same_ids, same_both = count_equal(trl, chats, numbers)

    bare, ours, theirs = "`tokenizers` alone: `encode_batch` of one string a chat", "ours: ids, weights, rows", "TRL, packing `bfd`"
    on_disk, uncut = "ours, by way of the cache file", "TRL, packing `bfd_split`"
    sides: dict[str, Callable[[], Result]] = {
        ours: lambda: run_ours(chats),
        on_disk: lambda: run_ours_on_disk(chats),
        theirs: lambda: trl.run("bfd"),
        uncut: lambda: trl.run("bfd_split"),
        bare: lambda: run_bare(texts),
        f"ours, all {len(all_chats)}": lambda: run_ours(all_chats),
    }
    results: dict[str, list[Result]] = {name: [] for name in sides}
    for number in range(args.repetitions):
        for name, side in sides.items():
            results[name].append(side())
            print(f"{number + 1}/{args.repetitions} {name}: {results[name][-1].seconds:.2f} s", file=sys.stderr)

    medians = {name: statistics.median(run.seconds for run in runs) for name, runs in results.items()}
    n_messages = sum(map(len, trainable))
    print(f"\n{len(everything)} conversations of chitchat, {len(trainable)} of them with a reply ({n_messages} messages): those are")
    print("encoded by every side, as TRL refuses the others; rows of 512 tokens, assistant's words learnt, one process.")
    print(f"\n| {args.repetitions} runs each, in turns | median s | min | max | tokens | learnt | rows | tokens/s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, runs in results.items():
        last, seconds = runs[-1], [run.seconds for run in runs]
        learnt, rows = ("–" if n < 0 else f"{n:,}" for n in (last.n_learnt, last.n_rows))
        times = f"{medians[name]:.2f} | {min(seconds):.2f} | {max(seconds):.2f}"
        print(f"| {name} | {times} | {last.n_tokens:,} | {learnt} | {rows} | {last.n_tokens / medians[name]:,.0f} |")
    print("\n| | ratio | goal |\n| --- | --- | --- |")
    print(f"| TRL / ours (`bfd`, which keeps a third of the tokens) | {medians[theirs] / medians[ours]:.2f} | at least 5 |")
    print(f"| TRL / ours, equal tokens (`bfd_split`) | {medians[uncut] / medians[ours]:.2f} | |")
    print(f"| TRL / ours, by way of the cache file | {medians[theirs] / medians[on_disk]:.2f} | |")
    print(f"| ours / `tokenizers` alone | {medians[ours] / medians[bare]:.2f} | at most 2 |")
    print(f"\nThe same work: of {len(numbers)} conversations, whole, {same_ids} have TRL's very ids and {same_both} its very mask, too.")
    print("(`bfd` drops what is longer than a row; `bfd_split` cuts it anywhere; ours splits it between exchanges and leaves out an end")
    print("that is never answered.)")
    print(_machine("tokenizers", "transformers", "trl", "datasets"))


def _record(chat: Chat) -> dict[str, Any]:
    return {"messages": chat, "id": "", "group": "", "labels": {}}


# Memory.


def write_chats(path: Path, *, size: int) -> int:
    """Write real chats over and over, each time with a word of every message exchanged, so that all differ.

    Args:
        path: The JSONL file.
        size: Its bytes, at least.

    Returns: how many conversations there are.
    """
    n_chats = n_bytes = 0
    with path.open("w", encoding="utf-8") as file:
        for line in _varied_chats():
            if n_bytes >= size:
                break
            n_bytes += file.write(line)  # ASCII: characters are bytes
            n_chats += 1
    return n_chats


def _varied_chats() -> Iterator[str]:
    from lightning_chatgpt.data.corpora import read_corpus

    corpora = [*read_corpus("chitchat"), *read_corpus("chatterbot/english")]
    chats = [[(message.role, message.content.split(" ")) for message in chat.messages] for chat in corpora]
    vocabulary = sorted({word for chat in chats for _, words in chat for word in words})
    chance = random.Random(0).random
    while True:
        for chat in chats:
            messages = []
            for role, words in chat:
                changed = list(words)
                changed[int(chance() * len(changed))] = vocabulary[int(chance() * len(vocabulary))]
                messages.append({"role": role, "content": " ".join(changed).strip() or "so"})
            yield json.dumps({"messages": messages}) + "\n"


def set_up(train: str, cache: str) -> Any:
    """A data module, set up for fit."""
    from lightning_chatgpt.data.chat import ChatDataModule

    data = ChatDataModule(
        train=train,
        validation=0.01,
        max_length=MAX_LENGTH,
        truncation="split",
        tokenizer=str(tokenizer_folder()),
        max_leak=1.0,  # looked for, and never too many: the chats are variations of a few thousand
        cache_dir=cache,
    )
    data.setup("fit")
    return data


def run_child(args: argparse.Namespace) -> None:
    """Set up one file, in a process of its own; prints what it took as JSON."""
    import lightning_chatgpt.data.chat

    assert lightning_chatgpt.data.chat is not None
    load_tokenizer()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    data = set_up(str(args.file), str(args.cache))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"seconds": seconds, "before": before, "peak": peak, "tokens": data.datasets["train"].counts["tokens"]}
    print(json.dumps(found))


def measure(path: Path, cache: Path) -> dict[str, Any]:
    """Set up one file in a fresh process, watched from outside.

    Returns: what :func:`run_child` prints, and ``anonymous``, the highest RssAnon seen, in bytes.
    """
    command = [sys.executable, __file__, "child", str(path), str(cache)]
    anonymous = 0
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        while child.poll() is None:
            anonymous = max(anonymous, _anonymous_bytes(child.pid))
            time.sleep(SAMPLE_SECONDS)
        output.seek(0)
        lines = output.read().splitlines()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}; run it by itself to see why")
    return {**json.loads(lines[-1]), "anonymous": anonymous}


def _anonymous_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # it has just ended
    return 0


def memory(args: argparse.Namespace) -> None:
    """Write sources of several sizes, set each up in a fresh process, and print the table."""
    if args.folder is not None:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        needed = int(args.gigabytes * 1e9 * 5)  # the source, and a cache of up to four times its size
        if shutil.disk_usage(folder).free < needed:
            raise SystemExit(f"{folder}: {needed / 1e9:.0f} GB of disk are needed; name a larger place with --folder")
        print("| source | chats | tokens | peak resident | of it by set-up | peak anonymous | s | MB/s | cache on disk |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        peaks: list[tuple[float, float]] = []
        for size in (int(args.gigabytes * 1e9 * share) for share in SHARES):
            source, cache = folder / "chats.jsonl", folder / "cache"
            n_chats = write_chats(source, size=size)
            found = measure(source, cache)
            on_disk = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
            shutil.rmtree(cache)
            size = source.stat().st_size
            peaks.append((size, found["peak"]))
            mebibytes = (found["peak"], found["peak"] - found["before"], found["anonymous"])
            resident = " | ".join(f"{value / MIB:.0f} MiB" for value in mebibytes)
            rate = f"{found['seconds']:.1f} | {size / 1e6 / found['seconds']:.2f}"
            print(f"| {size / 1e9:.3g} GB | {n_chats:,} | {found['tokens']:,} | {resident} | {rate} | {on_disk / 1e9:.3g} GB |", flush=True)
    (small, low), (large, high) = peaks[0], peaks[-1]
    print(f"\nGrowth: {(high - low) / MIB / ((large - small) / 1e9):.0f} MiB a GB of source. Goal: under 1536 MiB at 2 GB, and flat.")
    print(_machine("pyarrow", "numpy", "tokenizers", "torch", "lightning"))


# Profile.


def profile(args: argparse.Namespace) -> None:
    """Print what a cold set-up of chitchat spends its own time on."""
    load_tokenizer()  # what it imports is not the set-up's
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        set_up(args.source, str(Path(folder) / "plain"))
        print(f"Set-up without the profiler: {time.perf_counter() - start:.2f} s", flush=True)
        profiler = cProfile.Profile()
        profiler.runcall(set_up, args.source, str(Path(folder) / "profiled"))
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats(args.sort).print_stats(args.top)
    print(text.getvalue().replace(f"{Path(__file__).parent.parent}{os.sep}", ""))
    print(_machine("lightning-chatgpt", "tokenizers", "pyarrow"))


def _machine(*packages: str) -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next((line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu)
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"\n{date.today()}; {os.cpu_count()} cores of {cpu}; Python {platform.python_version()}, {versions}."


def main() -> None:
    """Read the command line and run what it names."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="{speed,memory,profile}")

    command = commands.add_parser("speed", help="chitchat to packed examples: ours, TRL's, the tokenizer alone")
    command.add_argument("--repetitions", type=int, default=5, help="runs of each side, in turns (default: %(default)s)")
    command.add_argument("--conversations", type=int, help="take the first so many only, to try it out (default: all 7168)")
    command.add_argument("--check", type=int, default=500, help="conversations whose ids are compared with TRL's (default: %(default)s)")
    command.set_defaults(run=speed)

    command = commands.add_parser("memory", help="peak memory of setting up JSONL files of an eighth, a quarter, a half and all of a size")
    command.add_argument("--gigabytes", type=float, default=2.0, help="size of the largest file, in 10**9 bytes (default: %(default)s)")
    command.add_argument("--folder", help="where files and caches are put meanwhile, on a disk (default: the system's temporary folder)")
    command.set_defaults(run=memory)

    command = commands.add_parser("profile", help="where the time of a cold set-up goes")
    command.add_argument("--source", default="corpus:chitchat", help="what is set up (default: %(default)s)")
    command.add_argument("--top", type=int, default=25, help="how many functions are listed (default: %(default)s)")
    command.add_argument("--sort", default="tottime", help="by own time, or as pstats sorts (default: %(default)s)")
    command.set_defaults(run=profile)

    command = commands.add_parser("child")  # a part of memory, in a process of its own
    command.add_argument("file", type=Path)
    command.add_argument("cache", type=Path)
    command.set_defaults(run=run_child)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
