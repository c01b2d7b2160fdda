"""Columns made categorical again, with the categories that a boosted model was trained on.

A body has text or numbers where training had pandas' category type; the models keep the categories and tell
by them. Knows tables and frames, and no framework.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loaders import batch as batches
from loaders.batch import Columns

if TYPE_CHECKING:
    from loaders.batch import Batch


def native(batch: Batch, categories: Mapping[int, Sequence[Any] | None]) -> Any:
    """The batch as the model is given it. `categories`: of each categorical column, by its place, the values
    in order; None for those that occur, where they are text. A value that is none of them becomes missing."""
    data = batches.native(batch)
    if not categories or not isinstance(batch, Columns):
        return data
    import pandas as pd

    columns = {}
    for place, name in enumerate(data.columns):
        column = data.iloc[:, place]
        known = categories.get(place)
        if known is not None or (place in categories and column.dtype.kind == "O"):
            index = pd.Index(column.dropna().unique() if known is None else known)
            codes = index.get_indexer(pd.Index(column))
            column = pd.Series(pd.Categorical.from_codes(codes, index), index=data.index)
        columns[name] = column
    return pd.DataFrame(columns, index=data.index, copy=False)
