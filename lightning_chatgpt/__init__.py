"""Turn a GPT into your own ChatGPT, on PyTorch Lightning.

The public names are imported when they are first used: ``import lightning_chatgpt`` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_chatgpt.callbacks.checkpoint import RunCheckpoint
    from lightning_chatgpt.callbacks.export import HuggingFaceExport
    from lightning_chatgpt.callbacks.nonfinite import NonFiniteGuard
    from lightning_chatgpt.callbacks.predictions import PredictionWriter
    from lightning_chatgpt.callbacks.resume import ExactResume
    from lightning_chatgpt.callbacks.samples import SampleGeneration
    from lightning_chatgpt.callbacks.stopping import GracefulStop, ProcessWatch
    from lightning_chatgpt.callbacks.throughput import TokenThroughput
    from lightning_chatgpt.chat.conversation import Conversation, Message
    from lightning_chatgpt.checkpoints.plugin import DurableCheckpointIO
    from lightning_chatgpt.cli import ChatCLI
    from lightning_chatgpt.data.chat import ChatDataModule
    from lightning_chatgpt.data.text import TextDataModule
    from lightning_chatgpt.errors import SaveError, UserError
    from lightning_chatgpt.metrics.perplexity import BitsPerByte, Perplexity, TokenAccuracy
    from lightning_chatgpt.models.build import load_model
    from lightning_chatgpt.models.causal_lm import CausalLMModule
    from lightning_chatgpt.models.strategies import ShardedStrategy, ZeroStrategy

try:
    __version__ = version("lightning-chatgpt")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0+unknown"

_ROOMS = {
    "BitsPerByte": "metrics.perplexity",
    "CausalLMModule": "models.causal_lm",
    "ChatCLI": "cli",
    "ChatDataModule": "data.chat",
    "Conversation": "chat.conversation",
    "DurableCheckpointIO": "checkpoints.plugin",
    "ExactResume": "callbacks.resume",
    "GracefulStop": "callbacks.stopping",
    "HuggingFaceExport": "callbacks.export",
    "Message": "chat.conversation",
    "NonFiniteGuard": "callbacks.nonfinite",
    "Perplexity": "metrics.perplexity",
    "PredictionWriter": "callbacks.predictions",
    "ProcessWatch": "callbacks.stopping",
    "RunCheckpoint": "callbacks.checkpoint",
    "SampleGeneration": "callbacks.samples",
    "SaveError": "errors",
    "ShardedStrategy": "models.strategies",
    "TextDataModule": "data.text",
    "TokenAccuracy": "metrics.perplexity",
    "TokenThroughput": "callbacks.throughput",
    "UserError": "errors",
    "ZeroStrategy": "models.strategies",
    "load_model": "models.build",
}

__all__ = [
    "BitsPerByte",
    "CausalLMModule",
    "ChatCLI",
    "ChatDataModule",
    "Conversation",
    "DurableCheckpointIO",
    "ExactResume",
    "GracefulStop",
    "HuggingFaceExport",
    "Message",
    "NonFiniteGuard",
    "Perplexity",
    "PredictionWriter",
    "ProcessWatch",
    "RunCheckpoint",
    "SampleGeneration",
    "SaveError",
    "ShardedStrategy",
    "TextDataModule",
    "TokenAccuracy",
    "TokenThroughput",
    "UserError",
    "ZeroStrategy",
    "__version__",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
