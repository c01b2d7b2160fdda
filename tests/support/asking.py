"""How the tests of enforcement ask: what came out, or where the faults are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from loaders.enforcement import InvalidInput, RawInput, enforce
from loaders.signature import (
    Signature,
)


def cast(signature: Signature | None, form: Any, data: Any, **options: Any) -> Any:
    return enforce(signature, RawInput(form, data), **options).batch


def faults(
    signature: Signature | None, raw: RawInput, params: Any = None, **options: Any
) -> list[tuple[str, str]]:
    with pytest.raises(InvalidInput) as refused:
        enforce(signature, raw, params, **options)
    assert refused.value.total == len(refused.value.violations)
    return [(violation.path, violation.problem) for violation in refused.value.violations]


def places(
    signature: Signature | None, form: Any, data: Any, params: Any = None, **options: Any
) -> list[str]:
    return [path for path, _ in faults(signature, RawInput(form, data), params, **options)]


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, float | np.floating) and math.isnan(wanted):
        return isinstance(found, float | np.floating) and bool(np.isnan(found))
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(same, found, wanted))
    return type(found) is type(wanted) and found == wanted
