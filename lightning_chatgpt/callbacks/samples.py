"""SampleGeneration: watch the replies improve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_chatgpt.callbacks.records import keep_records
from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.chat.encoding import Encoder
from lightning_chatgpt.errors import ConfigError
from lightning_chatgpt.generation.generate import check_sampling, generate_replies, max_positions

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_chatgpt.generation.generate import Reply

_PROMPTS = ["Hello, how are you?", "What do you like to do for fun?", "Tell me a joke."]


class SampleGeneration(Callback):
    """Answers fixed prompts while the model trains.

    The replies are shown in the terminal, appended to ``samples.jsonl`` in the run folder (``step``, ``prompt``, ``reply``,
    ``n_tokens``, ``finish_reason``), and sent to the loggers that take text. Training's random state and mode stay as they were.

    Args:
        prompts: What to ask, the same each time.
        every_n_steps: Optimizer steps between two samplings; null samples at each validation and at the start.
        max_new_tokens: Tokens a reply may have.
        temperature: 0 is greedy, so that samples can be compared over time; higher samples more freely.
        top_k: Samples among this many most likely tokens; 0 for all.
        top_p: Samples among the most likely tokens that together have this probability.
        filename: The file in the run folder.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(
        self,
        prompts: list[str] = _PROMPTS,
        every_n_steps: int | None = None,
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        filename: str = "samples.jsonl",
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(f"samples.every_n_steps must be at least 1, not {every_n_steps}")
        check_sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
        self.prompts = list(prompts)
        self.every_n_steps = every_n_steps
        self.max_new_tokens = max_new_tokens
        self.sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self.filename = filename
        self._last_step = -1
        self._n_records = 0
        self._goes_on = False

    def state_dict(self) -> dict[str, Any]:
        """How much was written. Called by Lightning."""
        return {"n_records": self._n_records, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after it. Called by Lightning."""
        self._n_records = state_dict["n_records"]
        self._last_step = state_dict["last_step"]
        self._goes_on = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out what was written after the checkpoint that the run goes on from."""
        if trainer.is_global_zero and self._goes_on:
            keep_records(Path(trainer.default_root_dir) / self.filename, self._n_records)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Sample every ``every_n_steps`` optimizer steps."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._sample(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample at each validation, the check before training included: it shows where the model started."""
        if self.every_n_steps is None and trainer.state.fn == "fit" and not (trainer.sanity_checking and self._goes_on):
            self._sample(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample once more at the end, unless that was just done."""
        self._sample(trainer, pl_module)

    def _sample(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step == self._last_step or not self.prompts:
            return  # inside an accumulation the step stands still
        self._last_step = trainer.global_step
        modes = {module: module.training for module in pl_module.modules()}
        pl_module.eval()
        # Every process takes part: a sharded network is gathered by all.
        try:
            with isolate_rng(), pl_module.gathered():
                replies = self._replies(pl_module)
        finally:
            for module, mode in modes.items():
                module.training = mode
        self._report(trainer, replies)

    def _replies(self, pl_module: Any) -> list[Reply]:
        room = max_positions(pl_module.network) - self.max_new_tokens
        chats = [Conversation((Message("user", prompt),)) for prompt in self.prompts]
        encoder = Encoder(pl_module.tokenizer, max_length=room)
        prompt_ids = [encoder.encode_prompt(chat) for chat in chats]
        return generate_replies(pl_module.network, pl_module.tokenizer, prompt_ids, max_new_tokens=self.max_new_tokens, **self.sampling)

    @rank_zero_only
    def _report(self, trainer: Trainer, replies: Sequence[Reply]) -> None:
        step = trainer.global_step
        path = Path(trainer.default_root_dir) / self.filename  # log_dir would broadcast, and wait for the other processes
        path.parent.mkdir(parents=True, exist_ok=True)
        self._n_records += len(replies)
        with path.open("a", encoding="utf-8") as lines:
            for prompt, reply in zip(self.prompts, replies, strict=True):
                record = {"step": step, "prompt": prompt, "reply": reply.text}
                record |= {"n_tokens": reply.n_tokens, "finish_reason": reply.finish_reason}
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
        _print_table(step, self.prompts, replies)
        rows = [[prompt, reply.text] for prompt, reply in zip(self.prompts, replies, strict=True)]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                table = "\n".join(["| prompt | reply |", "| --- | --- |", *(f"| {_one_line(p)} | {_one_line(r)} |" for p, r in rows)])
                logger.experiment.add_text("samples", table, global_step=step)
            elif hasattr(logger, "log_text"):  # Weights & Biases and others of its kind
                logger.log_text("samples", columns=["prompt", "reply"], data=rows, step=step)


def _one_line(text: str) -> str:
    return text.replace("\n", " / ").replace("|", "\\|")


def _print_table(step: int, prompts: Sequence[str], replies: Sequence[Reply]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Replies at step {step}", title_justify="left")
    table.add_column("prompt")
    table.add_column("reply")
    for prompt, reply in zip(prompts, replies, strict=True):
        cut = " […]" if reply.finish_reason == "length" else ""
        table.add_row(Text(prompt), Text(reply.text + cut))  # Text: a reply such as "[b]" is no markup
    console = Console()
    console.print()
    console.print(table)
