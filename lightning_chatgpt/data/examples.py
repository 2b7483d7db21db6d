"""The encoded examples of a part, as a torch data set whose items are rows for the collator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from lightning_chatgpt.data.collate import Tokens
from lightning_chatgpt.data.selection import SourceRows
from lightning_chatgpt.data.splits import Ints
from lightning_chatgpt.data.tables import TokenTable


class ExampleDataset(Dataset[list[Tokens]]):
    """Examples of one part, from one or more sources.

    Args:
        sources: Where the items lie.
        tables: For each source its examples.

    Attributes:
        lengths: (N,) tokens of each example.
        conversations: (N,) which item of the part each example came from.
        counts: What encoding counted, over all sources: ``items``, ``examples``, ``tokens``, ``supervised``, …
    """

    def __init__(self, sources: Sequence[SourceRows], tables: Sequence[TokenTable]) -> None:
        self.sources = list(sources)
        self.tables = list(tables)
        self._starts = np.cumsum([0, *(len(table) for table in tables)])
        n_items = np.cumsum([0, *(len(source.rows) for source in sources)])
        self.lengths: Ints = np.concatenate([np.array([], np.int64), *(table.lengths for table in tables)])
        self.conversations: Ints = np.concatenate([np.array([], np.int64), *(t.rows + n for t, n in zip(tables, n_items, strict=False))])
        self.counts: Counter[str] = Counter()
        for table in tables:
            self.counts.update(table.about["counts"])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: Sequence[int] | int) -> list[Tokens]:
        if isinstance(row, int):  # Lightning's own sampler, with trainer.overfit_batches
            return [self.example(row)]
        return [self.example(index) for index in row]

    def example(self, index: int) -> Tokens:
        """Token ids and loss weights of one example; shapes (T,)."""
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.tables[source].example(index - int(self._starts[source]))

    def content_of(self, index: int) -> str:
        """What an example came from, as it is stored."""
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = self.tables[source].rows[index - int(self._starts[source])]
        content: str = next(self.sources[source].table.column("content", self.sources[source].rows[row : row + 1]))
        return content
