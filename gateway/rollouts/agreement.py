"""Agreement of two versions: do their answers to the same requests say the same, and how sure is that?

`compare` looks at one request, `Agreement` collects many of them and gives the verdict. The unit is a row: a
request's share is the part of its rows whose values all agree, and the agreement is the mean of these shares.
So a request with a thousand rows counts as much as one with a single row.

Values agree if they are equal, or if they are numbers within a tolerance. A different label, text, date or
null is a *flip*. Columns that only the answer has are ignored, because callers of the reference do not read
them.

Shadow and replay use this module. Pure: answers in, counts out. Names output columns, but keeps no value of a
row. Knows batches; no clock, registry, process or HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, cast

import numpy as np

from gateway.rollouts.guards import ALPHA, Bet
from loaders.batch import Array, Batch, Columns, Opaque, Tensors, Value

TOLERANCE: Final = 0.01
"""Numbers agree if they differ by at most this share of the larger one (in an answer with several numbers
per row: of the largest one in the row, so that small probabilities next to large ones do not count)."""
SMALLEST: Final = 1e-9
"""Numbers that differ by less always agree: they are zero, as different processors compute it."""
COLUMNS_KEPT: Final = 200
"""More output columns than this are counted together, under `…`."""
WORST: Final = 5
"""So many of the worst columns, and so many examples of requests that differ, are shown."""
EXAMPLES: Final = 10
INPUTS_KEPT: Final = 10_000
"""So many inputs with other answers are known again; above, no further one is early proof."""
OTHERS: Final = "…"
#: The edges of the histogram of relative differences: 5 per power of ten.
_EDGES: Final = 10.0 ** (np.arange(-12 * 5, 2 * 5 + 1) / 5)


@dataclass(slots=True)
class Column:
    """The counts of one output column. `near`: numbers that differ within the tolerance. `flips`: values that
    differ and are not numbers. `spread`: a histogram of the relative differences that are not 0."""

    values: int = 0
    exact: int = 0
    near: int = 0
    flips: int = 0
    largest: float = 0.0
    spread: Array = field(default_factory=lambda: np.zeros(len(_EDGES) + 1, np.int64))

    @property
    def differ(self) -> int:
        return self.values - self.exact - self.near

    def add(self, other: Column) -> None:
        self.values += other.values
        self.exact += other.exact
        self.near += other.near
        self.flips += other.flips
        self.largest = max(self.largest, other.largest)
        self.spread = self.spread + other.spread

    def quantile(self, share: float) -> float:
        """The relative difference that this share of the values does not exceed, rounded up to the next edge
        of the histogram."""
        numbers = np.concatenate(([self.values - int(self.spread.sum())], self.spread))
        at = int(np.searchsorted(np.cumsum(numbers), share * self.values))
        if at == 0:
            return 0.0
        return float(min(_EDGES[at - 1], self.largest)) if at <= len(_EDGES) else self.largest

    def to_json(self) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "values": self.values,
            "exact": self.exact,
            "within_tolerance": self.near,
            "differ": self.differ,
            "flips": self.flips,
        }
        if self.spread.any():
            shown["relative_difference"] = {
                "median": _shown(self.quantile(0.5)),
                "p90": _shown(self.quantile(0.9)),
                "p99": _shown(self.quantile(0.99)),
                "largest": _shown(self.largest),
            }
        return shown


@dataclass(frozen=True, slots=True)
class Compared:
    """One request that both versions answered. `agreed` of `rows` agree; an answer without rows counts as one
    row. `exact`: every value is equal. `failed`: the candidate gave no answer. `other_form`: the answer has
    another form or another number of rows, so its values were not compared."""

    rows: int
    agreed: int
    exact: bool = False
    failed: bool = False
    other_form: bool = False
    columns: Mapping[str, Column] = field(default_factory=dict)

    @property
    def share(self) -> float:
        return self.agreed / self.rows if self.rows else 1.0

    @property
    def agrees(self) -> bool:
        return self.agreed == self.rows


def unanswered(reference: Batch) -> Compared:
    """The candidate failed at a request that the version in service answered."""
    return Compared(reference.rows or 1, 0, failed=True)


def compare(answer: Batch, reference: Batch, tolerance: float = TOLERANCE) -> Compared:
    """Compares the candidate's answer with the reference: the answer of the version in service."""
    try:
        with np.errstate(all="ignore"):  # numbers that are not finite are an answer too
            return _compared(answer, reference, tolerance)
    except RecursionError:
        return Compared(reference.rows or 1, 0, other_form=True)


def _compared(answer: Batch, reference: Batch, tolerance: float) -> Compared:
    if type(answer) is not type(reference):
        answer, reference = _plain(answer), _plain(reference)
    if type(answer) is not type(reference) or answer.rows != reference.rows:
        return Compared(reference.rows or 1, 0, other_form=True)
    rows = reference.rows
    columns: dict[str, Column] = {}
    agreed = np.ones(1 if rows is None else rows, np.bool_)
    if isinstance(reference, Value):
        theirs = cast(Value, answer).value
        pairs = [(theirs, reference.value)] if rows is None else zip(theirs, reference.value, strict=True)
        column = columns[""] = Column()
        _values(pairs, tolerance, column, agreed)
    else:
        found: Mapping[Any, Array] = cast("Columns | Tensors", answer).arrays
        for name, array in reference.arrays.items():
            said = str(name) if len(columns) < COLUMNS_KEPT else OTHERS
            column = Column()
            same = _array(found.get(name), array, tolerance, column)
            agreed &= same.all(axis=None if rows is None else tuple(range(1, same.ndim)))
            columns.setdefault(said, Column()).add(column)
    exact = all(column.exact == column.values for column in columns.values())
    return Compared(len(agreed), int(agreed.sum()), exact, columns=columns)


def _plain(batch: Batch) -> Batch:
    """An unnamed array as the list that callers get for it, because some models answer with an array and
    others with a list."""
    if isinstance(batch, Tensors) and batch.arrays.keys() == {""}:
        return Value(batch.arrays[""].tolist(), batch.rows)
    return batch


def _array(answer: Array | None, reference: Array, tolerance: float, column: Column) -> Array:
    """Which values of an array agree. Adds them to `column`."""
    column.values = reference.size
    if answer is None or answer.shape != reference.shape:
        column.flips = 0 if reference.dtype.kind in "fc" else reference.size
        return np.zeros(reference.shape, np.bool_)
    if reference.dtype.kind == "O" or answer.dtype.kind == "O":
        same = np.empty(reference.shape, np.bool_)
        column.values = 0
        pairs = zip(_listed(answer), _listed(reference), strict=True)
        _values(pairs, tolerance, column, same.reshape(-1))
        return same
    gaps, theirs = np.ma.getmaskarray(reference), np.ma.getmaskarray(answer)
    answer, reference = np.ma.getdata(answer), np.ma.getdata(reference)
    numbers = reference.dtype.kind in "fc" and answer.dtype.kind in "iufc"
    same = _equal(answer, reference)
    same = np.where(gaps | theirs, gaps & theirs, same)
    column.exact = int(same.sum())
    if not numbers:
        column.flips = reference.size - column.exact
        return same
    relative, near = _distance(answer, reference, tolerance)
    near &= ~same & ~gaps & ~theirs
    column.near = int(near.sum())
    _spread(column, relative[~same])
    return cast(Array, same | near)


def _listed(array: Array) -> list[Any]:
    """The values of an array as Python objects; a missing one is None."""
    return array.reshape(-1).tolist()


def _equal(answer: Array, reference: Array) -> Array:
    kinds = answer.dtype.kind, reference.dtype.kind
    if kinds[0] != kinds[1] and not set(kinds) <= set("biufc"):
        return np.zeros(reference.shape, np.bool_)
    same = np.asarray(answer == reference)
    if kinds[0] in "mM":
        same |= np.asarray(np.isnat(answer) & np.isnat(reference))
    elif kinds[0] in "fc" and kinds[1] in "fc":
        same |= np.asarray(np.isnan(answer) & np.isnan(reference))
    return same


def _distance(answer: Array, reference: Array, tolerance: float) -> tuple[Array, Array]:
    """The relative differences of numbers (infinite where one is not finite), and which are within the
    tolerance."""
    wide = np.complex128 if "c" in (answer.dtype.kind, reference.dtype.kind) else np.float64
    one, other = answer.astype(wide), reference.astype(wide)
    finite = np.isfinite(one) & np.isfinite(other)
    one, other = np.where(finite, one, 0.0), np.where(finite, other, 0.0)
    # Halves, so that the difference of two huge numbers is finite.
    half = np.abs(one / 2 - other / 2)
    scale = np.maximum(np.abs(one / 2), np.abs(other / 2))
    if scale.ndim > 1:
        scale = np.broadcast_to(
            scale.max(axis=tuple(range(1, scale.ndim)), keepdims=True, initial=0.0), scale.shape
        )
    relative = np.divide(half, scale, out=np.zeros_like(half), where=scale > 0)
    near = finite & ((relative <= tolerance) | (half <= SMALLEST / 2))
    return np.where(finite, relative, math.inf), near


def _spread(column: Column, relative: Array) -> None:
    if not relative.size:
        return
    column.largest = max(column.largest, float(relative.max()))
    places = np.searchsorted(_EDGES, relative, side="left")
    column.spread = column.spread + np.bincount(places, minlength=len(_EDGES) + 1)


@dataclass(slots=True)
class _Numbers:
    """Numbers of nested values that are compared together, because one by one they take a hundred times as
    long. `places`: the row of each."""

    tolerance: float
    place: int = 0
    answers: list[Any] = field(default_factory=list)
    references: list[Any] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    def add(self, answer: Any, reference: Any) -> None:
        self.answers.append(answer)
        self.references.append(reference)
        self.places.append(self.place)


def _values(pairs: Iterable[tuple[Any, Any]], tolerance: float, column: Column, agreed: Array) -> None:
    """Sets `agreed` for each pair of values, and adds them to `column`."""
    numbers = _Numbers(tolerance)
    for at, (one, other) in enumerate(pairs):
        numbers.place = at
        agreed[at] = _value(one, other, numbers, column)
    if numbers.places:
        part = Column()
        answers, references = (np.array(them, np.float64) for them in (numbers.answers, numbers.references))
        same = _array(answers, references, tolerance, part)
        column.add(part)
        agreed[np.array(numbers.places)[~same]] = False


def _value(answer: Any, reference: Any, numbers: _Numbers, column: Column) -> bool:
    """Whether two values agree: each number, text or null in nested lists and objects. Adds them to
    `column`, and the numbers to `numbers`. The depth is bounded, because both came through the wire, which
    bounds it."""
    if isinstance(reference, float | np.floating) and _is_number(answer):
        numbers.add(answer, reference)
        return True  # as long as the numbers agree too
    if isinstance(reference, np.ndarray):
        part = Column()
        given = answer if isinstance(answer, np.ndarray) else None
        agrees = bool(_array(given, reference, numbers.tolerance, part).all())
        column.add(part)
        return agrees
    if isinstance(reference, dict):
        if not isinstance(answer, dict):
            return _counted(column, exact=False)
        # Every key is looked at, so that the counts do not depend on the order.
        found = [_value(answer.get(key), item, numbers, column) for key, item in reference.items()]
        return all(found)
    if isinstance(reference, list | tuple):
        if not isinstance(answer, list | tuple) or len(answer) != len(reference):
            return _counted(column, exact=False)
        pairs = zip(answer, reference, strict=True)
        found = [_value(one, other, numbers, column) for one, other in pairs]
        return all(found)
    if isinstance(reference, Opaque):
        return _counted(column, exact=isinstance(answer, Opaque) and answer.kind == reference.kind)
    if isinstance(reference, bool) != isinstance(answer, bool) or isinstance(answer, np.ndarray):
        return _counted(column, exact=False)
    try:
        same = bool(answer == reference)
    except (TypeError, ValueError):
        same = False
    return _counted(column, exact=same)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    return not isinstance(value, int) or abs(value) < 2**1023


def _counted(column: Column, *, exact: bool) -> bool:
    column.values += 1
    column.exact += exact
    column.flips += not exact
    return exact


class Outcome(StrEnum):
    """`thin`: fewer requests than wanted, and no proof that the agreement is too low."""

    PASSED = "passed"
    FAILED = "failed"
    THIN = "thin"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`evidence` is JSON-ready."""

    outcome: Outcome
    evidence: dict[str, Any]

    def __str__(self) -> str:
        found = self.evidence
        if not found["requests"]:
            return f"0 of {found['requests_wanted']} requests were compared"
        text = f"{found['differ']} of {found['requests']} requests got another answer"
        if found["failed"]:
            text += f" ({found['failed']} of them none)"
        text += f": agreement {found['agreement']:.4f}, wanted {found['wanted']:g}"
        if self.outcome is Outcome.FAILED and found["requests"] < found["requests_wanted"]:
            text += f"; certain before {found['requests_wanted']} requests"
        return text


class Agreement:
    """The agreement of a candidate with the version in service. `wanted`: the lowest agreement that passes, 0
    to 1. `requests`: how many must be compared.

    It passes if at least `requests` were compared and the mean share is not below `wanted`. Below, it fails.
    With fewer requests it never passes; it fails only if an e-process against "the agreement is at least
    `wanted`" reaches 1/alpha, which stays valid although it is looked at after every request
    (`rollouts.guards`). There, an input that is repeated counts against the candidate only once, because it
    gets the same answers again.
    """

    def __init__(self, wanted: float, requests: int, *, alpha: float = ALPHA) -> None:
        self.wanted = wanted
        self.requests_wanted = requests
        self.requests = self.exact = self.agreed = self.failed = self.other_form = 0
        self.rows = self.rows_agreed = 0
        self._alpha = alpha
        self._shares = 0.0
        self._allowed = 1.0 - wanted
        self._bet = Bet(self._allowed) if self._allowed > 0 else None
        self._columns: dict[str, Column] = {}
        self._examples: list[str] = []
        self._inputs: set[str] = set()

    def add(self, compared: Compared, example: str = "", *, repeats: bool = False) -> None:
        """Adds a request. `example`: its hash, which is shown if the answers differ. `repeats`: requests with
        the same input have the same hash."""
        self.requests += 1
        self.exact += compared.exact
        self.agreed += compared.agrees
        self.failed += compared.failed
        self.other_form += compared.other_form
        self.rows += compared.rows
        self.rows_agreed += compared.agreed
        self._shares += compared.share
        against = (1.0 - compared.share) - self._allowed
        if self._bet is not None and (against <= 0 or self._is_new(example, repeats=repeats)):
            self._bet.observe(against)
        for name, column in compared.columns.items():
            kept = name if name in self._columns or len(self._columns) < COLUMNS_KEPT else OTHERS
            self._columns.setdefault(kept, Column()).add(column)
        shown = example and not compared.agrees and example not in self._examples
        if shown and len(self._examples) < EXAMPLES:
            self._examples.append(example)

    def _is_new(self, example: str, *, repeats: bool) -> bool:
        if not (repeats and example):
            return True
        before = len(self._inputs)
        if before < INPUTS_KEPT:
            self._inputs.add(example)
        return len(self._inputs) > before

    @property
    def answers(self) -> int:
        """How many requests the candidate has answered."""
        return self.requests - self.failed

    @property
    def differ(self) -> int:
        return self.requests - self.agreed

    @property
    def agreement(self) -> float | None:
        """The mean share of agreeing rows; None if no request was compared."""
        return self._shares / self.requests if self.requests else None

    @property
    def breached(self) -> bool:
        """Returns True if the agreement is proved to be below `wanted`, however often it is called."""
        if self._bet is None:
            return self.rows_agreed < self.rows
        return self._bet.peak >= 1.0 / self._alpha

    @property
    def outcome(self) -> Outcome:
        agreement = self.agreement
        if agreement is not None and self.requests >= self.requests_wanted:
            # Sums of shares such as 0.98 are not exact.
            return Outcome.PASSED if agreement >= self.wanted - 1e-9 else Outcome.FAILED
        return Outcome.FAILED if self.breached else Outcome.THIN

    def verdict(self) -> Verdict:
        agreement = self.agreement
        evidence: dict[str, Any] = {
            "requests": self.requests,
            "requests_wanted": self.requests_wanted,
            "agreement": None if agreement is None else round(agreement, 6),
            "wanted": self.wanted,
            "exact": self.exact,
            "within_tolerance": self.agreed - self.exact,
            "differ": self.differ,
            "failed": self.failed,
            "other_form": self.other_form,
            "rows": self.rows,
            "rows_differ": self.rows - self.rows_agreed,
            "label_flips": sum(column.flips for column in self._columns.values()),
        }
        if agreement is not None:
            low, high = bounds(agreement, self.requests, self._alpha)
            evidence["between"] = [round(low, 4), round(high, 4)]
            evidence["confidence"] = 1 - 2 * self._alpha
            evidence["test"] = "mean over requests, with Hoeffding's bounds; betting e-process while too few"
        worst = sorted(self._columns.items(), key=lambda item: (-_rate(item[1]), item[0]))[:WORST]
        evidence["worst_columns"] = {name or "output": column.to_json() for name, column in worst}
        evidence["examples"] = list(self._examples)
        return Verdict(self.outcome, evidence)


def bounds(mean: float, count: int, alpha: float = ALPHA) -> tuple[float, float]:
    """The true mean of observations in [0, 1] is below the first number, and above the second, with
    probability at most `alpha` each, for any count (Hoeffding 1963, theorem 1, first inequality)."""
    mean = min(max(mean, 0.0), 1.0)
    limit = math.log(1.0 / alpha) / count
    return _edge(mean, 0.0, limit), _edge(mean, 1.0, limit)


def _edge(mean: float, end: float, limit: float) -> float:
    """The value between `mean` and `end` at which the divergence reaches `limit`."""
    inside, outside = mean, end
    for _ in range(60):
        middle = (inside + outside) / 2
        if _divergence(mean, middle) <= limit:
            inside = middle
        else:
            outside = middle
    return outside


def _divergence(p: float, q: float) -> float:
    """Between two coins that show heads with probability p and q."""
    if q <= 0.0 or q >= 1.0:
        return 0.0 if p == q else math.inf
    first = p * math.log(p / q) if p > 0 else 0.0
    return first + ((1 - p) * math.log((1 - p) / (1 - q)) if p < 1 else 0.0)


def _rate(column: Column) -> float:
    return column.differ / column.values if column.values else 0.0


def _shown(number: float) -> float | None:
    """A number with few digits; None for one that JSON does not have."""
    return float(f"{number:.3g}") if math.isfinite(number) else None
