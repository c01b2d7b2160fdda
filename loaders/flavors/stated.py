"""Signatures that model files state: the names, types and shapes of their inputs.

Used for a model file without an `MLmodel`. A file that states less gets no signature. Must not know
frameworks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from loaders.schema import AnyType, ColSpec, Scalar, TensorSpec

if TYPE_CHECKING:
    from loaders.schema import Type
    from loaders.signature import Signature


def columns(names: Iterable[object], kinds: Sequence[Type]) -> Signature | None:
    """Returns required columns; None if a name is not text. A column of `AnyType` accepts any value."""
    from loaders.signature import Signature

    listed = list(names)
    if not listed or len(listed) != len(kinds) or not all(isinstance(name, str) for name in listed):
        return None
    specs = [ColSpec(kind, str(name), not isinstance(kind, AnyType)) for name, kind in zip(listed, kinds)]
    return Signature(tuple(specs))


def matrix(width: int) -> Signature | None:
    """Returns rows of `width` numbers without names."""
    from loaders.signature import Signature

    return Signature((TensorSpec(np.dtype(np.float64), (-1, width)),)) if width > 0 else None


def of_categories(known: Sequence[object] | None) -> Type:
    """Returns the type of a categorical column: text if its categories are text, else any."""
    return Scalar.string if known and all(isinstance(one, str) for one in known) else AnyType()
