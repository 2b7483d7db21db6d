"""What is ours within lm-eval: its transformers model with one progress bar and its cuts counted, and the task of replies.

Importing this imports lm-eval.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from lightning_chatgpt.errors import DataError, ModelError


class ScoringModel(HFLM):  # type: ignore[misc]
    """A transformers folder, as lm-eval's own ``hf`` loads and scores it, in float32.

    Args:
        folder: The model.
        batch_size: How many texts, or windows of them, are scored at once.
        device: Where, such as ``cpu`` or ``cuda``.

    Attributes:
        n_cut: Requests that were longer than the model has positions; lm-eval leaves their beginning out.
        n_requests: All requests that have a context.
        n_spelt: Documents that spell a control token, which lm-eval takes for one.

    Raises:
        ModelError: It cannot be loaded, or has no token to begin a text with.
    """

    logits_cache: bool

    def __init__(self, folder: Path, *, batch_size: int, device: str) -> None:
        from safetensors import SafetensorError

        try:
            super().__init__(pretrained=str(folder), dtype="float32", batch_size=batch_size, device=device)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{folder}: lm-eval cannot load it ({str(error).strip().splitlines()[0]}); export it again") from None
        if self.prefix_token_id is None:
            raise ModelError(
                f"{folder}: its tokenizer has neither bos_token nor eos_token, one of which lm-eval puts before each text; "
                "name the token that ends a text as eos_token in tokenizer_config.json"
            )
        self.n_cut = self.n_requests = self.n_spelt = 0

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole documents, window by window, with one bar in place of one for each batch."""
        texts = [request.args[0] for request in requests]
        self.n_spelt += sum(any(str(token) in text for token in self.tokenizer.all_special_tokens) for text in texts)
        n_windows = sum(-(-len(self.tok_encode(text)) // self.max_length) for text in texts)
        # Of two windows that read the same tokens, and score another number of them, lm-eval's cache gives both the first one's score.
        kept, self.logits_cache = self.logits_cache, False
        try:
            with tqdm(total=n_windows, desc="Scoring windows", disable=disable_tqdm) as self._bar:
                scores: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self.logits_cache = kept
        return scores

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        if override_bs is not None:  # a batch of windows
            scores = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
            self._bar.update(len(requests))
            return scores
        for (_, continuation), _, ids in requests:
            if len(ids) > self.max_length:
                about = f"its {len(ids)} tokens are more than the model's {self.max_length} positions"
                raise DataError(
                    f"harness: the answer that begins with {continuation[:40]!r} is too long: {about}; shorten it, or leave it out"
                )
        self.n_requests += len(requests)
        self.n_cut += sum(len(context) + len(ids) > self.max_length + 1 for _, context, ids in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm)


class ReplyTask(ConfigurableTask):  # type: ignore[misc]
    """The likelihood of a reply, given all that stands before it.

    lm-eval counts white space at the end of a context, here that behind ``assistant``, among what is predicted. So it is scored by itself
    as well, and taken off again.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """The reply, and the white space before it where there is some."""
        space = ctx[len(ctx.rstrip()) :]
        pairs = [(ctx, doc["reply"])] + ([(ctx.rstrip(), space)] if space else [])
        metadata = kwargs["metadata"]
        return [Instance(request_type="loglikelihood", doc=doc, arguments=pair, idx=i, metadata=metadata) for i, pair in enumerate(pairs)]

    def process_results(self, doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
        """The reply's log-likelihood, and its bytes to divide it by."""
        score = results[0][0] - sum(likelihood for likelihood, _ in results[1:])
        return {name: (score, doc["n_bytes"]) for name in ("bits_per_byte", "byte_perplexity")}
