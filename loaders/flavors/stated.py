"""Signatures that model files state themselves: the names, types and shapes of their inputs.

Used for a model file without an `MLmodel`, which says nothing else of its inputs. A file that says less gets
no signature. Knows no framework.
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
    """Required columns; None where a name is not text. A column of `AnyType` takes any value."""
    from loaders.signature import Signature

    listed = list(names)
    if not listed or len(listed) != len(kinds) or not all(isinstance(name, str) for name in listed):
        return None
    specs = [ColSpec(kind, str(name), not isinstance(kind, AnyType)) for name, kind in zip(listed, kinds)]
    return Signature(tuple(specs))


def matrix(width: int) -> Signature | None:
    """Rows of numbers without names."""
    from loaders.signature import Signature

    return Signature((TensorSpec(np.dtype(np.float64), (-1, width)),)) if width > 0 else None


def of_categories(known: Sequence[object] | None) -> Type:
    """The type of a categorical column: text where its categories are text, else any."""
    return Scalar.string if known and all(isinstance(one, str) for one in known) else AnyType()
