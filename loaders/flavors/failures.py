"""Decides which part of a model's exception the caller may see: never text that can contain input data.

An exception's text may repeat the input, so the caller sees only its class. Two kinds of text are shown: that
of `Unsuitable`, which flavors raise, and the sentences below, which frameworks write and which contain no
data. Knows exceptions and text.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple


class Unsuitable(ValueError):
    """The input fits the signature but not the model, or there is no signature. The text tells the caller
    what to send, and contains no data."""


class Failure(NamedTuple):
    """`text`: the part that the caller may see; None: only the class. `unsuitable`: the input is the
    cause."""

    text: str | None
    unsuitable: bool


_KNOWN: Final = tuple(
    re.compile(sentence)
    for sentence in (
        r"the answer has two columns named '[^']+'",
        # scikit-learn
        r"Input (X|y)? ?contains NaN\.?",
        r"Input (X|y)? ?contains infinity or a value too large for dtype\('\w+'\)\.?",
        r"X has \d+ features, but \w+ is expecting \d+ features as input\.?",
        r"Expected 2D array, got 1D array instead:",
        # LightGBM, XGBoost, CatBoost
        r"The number of features in data \(\d+\) is not the same as it was in training data \(\d+\)\.",
        r"Feature shape mismatch, expected: \d+, got \d+",
        r"Input data contains `inf` or a value too large, while `missing` is not set to `inf`",
        # PyTorch
        r"mat1 and mat2 shapes cannot be multiplied \(\d+x\d+ and \d+x\d+\)",
    )
)
"""First lines of errors that contain no data."""


def failure(error: BaseException) -> Failure:
    """Returns the part of a model's exception that a caller may read."""
    try:
        first = str(error).partition("\n")[0].strip()
    except BaseException:  # noqa: BLE001 - its __str__ is the model's code as well
        return Failure(None, False)
    if type(error) is Unsuitable:
        return Failure(first, True)
    return Failure(first if any(known.fullmatch(first) for known in _KNOWN) else None, False)
