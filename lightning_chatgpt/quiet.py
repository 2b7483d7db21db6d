"""What Lightning and transformers say that a user can do nothing about."""

from __future__ import annotations

import logging
import warnings


def quieten() -> None:
    """Leave out some warnings, an advertisement, and bars for a moment's work."""
    from transformers.utils import logging as transformers_logging

    for message in (
        ".*does not have many workers.*",
        ".*is not supported by the model summary.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*isinstance.treespec, LeafSpec.* is deprecated.*",
        ".*default `LightningModule.configure_gradient_clipping` will not actually.*",  # DeepSpeed clips by itself, as it should
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.getMessage())
    transformers_logging.disable_progress_bar()
