"""The recorded answer of a package: its answer to its own input example when it was logged.

The package holds it as `example_answer.json`, in the form of a server's answer. So every machine that loads
the package can check whether the answer there is the same. Knows batches and JSON; must not know how a model
predicts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loaders.batch import Columns, Tensors
from loaders.plain import NotPlain, plain
from loaders.spelling import counted

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.package import Package

FILE: Final = "example_answer.json"
MAX_BYTES: Final = 1 << 20
"""A larger answer is not recorded, and a larger file is not read."""

_KEY: Final = "predictions"
_MAX_LEAVES: Final = 1_000_000
# Relative tolerance of numbers: another processor or build of the same library may cause such differences.
_WIDE: Final = 1e-6
_NARROW: Final = 1e-4


@dataclass(frozen=True)
class Difference:
    """A place where two answers differ, such as `predictions[1].price`, and both values. Clients may see only
    the place, because the values are data."""

    place: str
    recorded: Any
    answered: Any

    @property
    def shown_recorded(self) -> str:
        return _short(self.recorded)

    @property
    def shown_answered(self) -> str:
        return _short(self.answered)

    def __str__(self) -> str:
        return f"{self.place} ({self.shown_recorded}, then {self.shown_answered})"


class Unreadable(ValueError):
    """The file exists but holds no recorded answer. The message shows no data and no path."""


def form(answer: Batch) -> Any:
    """An answer in the server's form: a frame as records, one array as a nested list, several arrays as an
    object, any other value as itself. Raises NotPlain for a value that JSON cannot represent."""
    if isinstance(answer, Columns):
        columns = {str(name): plain(array.tolist(), f"{_KEY}.{name}") for name, array in _items(answer)}
        return [dict(zip(columns, row)) for row in zip(*columns.values())]
    if isinstance(answer, Tensors):
        arrays = {name: plain(array.tolist(), name or _KEY) for name, array in _items(answer)}
        return arrays[""] if list(arrays) == [""] else arrays
    return plain(answer.value, _KEY)


def _items(answer: Columns | Tensors) -> Iterator[tuple[Any, Any]]:
    for name, array in answer.arrays.items():
        yield name, array.astype("datetime64[us]") if array.dtype.kind == "M" else array


def write(directory: Path, answer: Any) -> bool:
    """Writes an answer in the form of `form`. Returns False, and writes nothing, above `MAX_BYTES`."""
    text = json.dumps({_KEY: answer}, allow_nan=False)
    if len(text) > MAX_BYTES:
        return False
    (directory / FILE).write_text(text, encoding="utf-8")
    return True


def read(package: Package) -> Any | None:
    """The recorded answer; None if there is none. Raises Unreadable."""
    from loaders.package import PackageError

    if not (package.path / FILE).exists():
        return None
    try:
        file = package.inside(FILE)
        if file.stat().st_size > MAX_BYTES:
            raise Unreadable(f"{FILE} is larger than {MAX_BYTES >> 20} MiB")
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError, PackageError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"{FILE} is not readable JSON") from None
    if not isinstance(content, dict) or _KEY not in content:
        raise Unreadable(f"{FILE} holds no predictions")
    return content[_KEY]


def differences(recorded: Any, answer: Batch) -> list[Difference]:
    """The places where `answer` differs from a recorded one (`form`): the first place of each field. Empty if
    they are equal within the tolerance for numbers.

    The answer may come from a hostile model: a much larger one is never converted.
    """
    leaves = _count(recorded, _MAX_LEAVES)
    if isinstance(answer, (Columns, Tensors)):
        arrays = answer.arrays.values()
        size = max([answer.rows or 0, sum(_count(array, leaves) for array in arrays)])
        tolerance = _NARROW if any(a.dtype.kind == "f" and a.dtype.itemsize < 8 for a in arrays) else _WIDE
    else:
        size, tolerance = _count(answer.value, leaves), _NARROW
    if size > leaves:
        return [Difference(_KEY, f"{leaves} values", "more")]
    try:
        said = form(answer)
    except (NotPlain, RecursionError) as error:
        return [Difference(_KEY, f"{leaves} values", str(error))]
    numbers = [abs(leaf) for leaf in _leaves(recorded) if _is_number(leaf)]
    scale = min(max(numbers, default=1.0), 1.0)
    found: dict[str, Difference] = {}
    for field, difference in _differing(recorded, said, tolerance, scale, _KEY, ""):
        found.setdefault(field, difference)
    return list(found.values())


def told(differing: list[Difference]) -> str:
    """The warning about a different answer: names fields, shows no data."""
    places = ", ".join(difference.place for difference in differing[:3])
    rest = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    return f"the answer to the input example differs from the recorded one, at {places}{rest}"


def _differing(
    was: Any, now: Any, tolerance: float, scale: float, place: str, field: str
) -> Iterator[tuple[str, Difference]]:
    """The differing leaves, each with its place and its field: the place without positions in lists."""
    if isinstance(was, dict) and isinstance(now, dict):
        for name in {**was, **now}:
            inner = f"{place}.{name}", f"{field}.{name}"
            if name in was and name in now:
                yield from _differing(was[name], now[name], tolerance, scale, *inner)
            else:
                there, here = ("a value", "none") if name in was else ("none", "a value")
                yield inner[1], Difference(inner[0], there, here)
    elif isinstance(was, list) and isinstance(now, list):
        if len(was) != len(now):
            yield field, Difference(place, counted(len(was), "item"), counted(len(now), "item"))
            return
        for position, (one, other) in enumerate(zip(was, now)):
            yield from _differing(one, other, tolerance, scale, f"{place}[{position}]", field)
    elif _is_number(was) and _is_number(now):
        if not math.isclose(was, now, rel_tol=tolerance, abs_tol=tolerance * scale):
            yield field, Difference(place, was, now)
    elif type(was) is not type(now) or was != now:
        yield field, Difference(place, was, now)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _leaves(value: Any) -> Iterator[Any]:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list):
            pending += item
        else:
            yield item


def _count(value: Any, limit: int) -> int:
    """How many values an answer holds; stops counting a little above `limit`."""
    count, pending = 0, [value]
    while pending and count <= limit:
        item = pending.pop()
        if isinstance(item, np.ndarray):
            if item.size > limit or item.dtype.kind != "O":
                count += item.size
            else:
                pending += item.ravel().tolist()
        elif isinstance(item, (list, tuple, dict)):
            if len(item) > limit:
                return len(item)
            pending += item.values() if isinstance(item, dict) else item
            count += not item
        else:
            count += 1
    return count


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 80 else text[:77] + "..."
