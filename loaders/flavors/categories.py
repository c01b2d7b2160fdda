"""Makes columns categorical again, with the categories that a boosted model was trained on.

A request has text or numbers in a column that had pandas' category type in training. The models keep the
categories. Knows tables and frames; must not know a framework.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loaders import batch as batches
from loaders.batch import Columns

if TYPE_CHECKING:
    from loaders.batch import Batch


def native(batch: Batch, categories: Mapping[int, Sequence[Any] | None]) -> Any:
    """Returns the input for the model. `categories`: the ordered values of each categorical column, by the
    column's position; None for the values that occur, if they are text. An unknown value becomes missing."""
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
