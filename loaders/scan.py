"""Finds what loading a package's files executes, without executing any of it.

A file in a framework's own format executes nothing. A pickle calls what it names. This module reads it
operation by operation, as a machine whose stack holds only names, texts and unknowns. A pickle is proved
harmless if each name is on the list below and each call is a call of such a name. A pickle that cannot be
followed to its last byte is not proved: if it calls an object made during loading, builds a name during
loading, has a persistent id, uses the registry of extensions, has bytes after its end, or is compressed. The
proof covers only pickles; the sandbox protects from a framework's own code with hostile values. Must not know
the gateway.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Any, Final

from loaders import flavors, opcodes
from loaders.flavors.lightgbm import BOOSTER
from loaders.package import PackageError

if TYPE_CHECKING:
    from pathlib import Path

    from loaders.package import Package

#: The edition of this scan. Raise it with any change here, so that results of an earlier edition are not
#: used.
EDITION: Final = 4
#: A longer pickle would hold the interpreter's lock for too long.
MOST_OPERATIONS: Final = 300_000
MOST_BYTES: Final = 256 << 20

_CLASS: Final = r"_?[A-Z]\w*"
#: The allowed names: modules (a pattern for the whole name) and names in them.
_LISTED: Final = tuple(
    (re.compile(modules + r"\Z"), re.compile(f"(?:{names})\\Z"))
    for modules, names in (
        (
            r"(?:__builtin__|builtins)",
            "object|set|frozenset|slice|range|xrange|complex|bytearray|bytes|list|dict|tuple|int|long|float|str"
            "|unicode|bool",
        ),
        (r"copy_reg|copyreg", "_reconstructor"),
        (r"_codecs", "encode"),
        (r"collections", "OrderedDict|defaultdict|deque|Counter"),
        (r"datetime", "datetime|date|time|timedelta|timezone"),
        (r"decimal", "Decimal"),
        (r"numpy", "ndarray|dtype|matrix|bool_|str_|bytes_|object_|void|datetime64|timedelta64"
                   r"|u?int(?:8|16|32|64|p|c)?_?|(?:float|complex)(?:16|32|64|128|256)?_?|longlong|longdouble"
                   "|log|log2|log10|log1p|exp|expm1|exp2|sqrt|square|cbrt|abs|absolute|sign|reciprocal|negative"
                   "|sin|cos|tan|arcsin|arccos|arctan|sinh|cosh|tanh|arcsinh|arccosh|arctanh|floor|ceil|rint"),
        (r"numpy\.(?:core|_core)\.multiarray", "_reconstruct|scalar"),
        (r"numpy\.(?:core|_core)\.numeric", "_frombuffer"),
        (r"numpy\.ma(?:\.core)?", "_mareconstruct|MaskedArray"),
        (r"numpy\.random\._pickle", r"__\w+_ctor"),
        (r"numpy\.random\._\w+", "PCG64|PCG64DXSM|MT19937|Philox|SFC64"),
        (r"numpy\.random\.mtrand", "RandomState"),
        (r"numpy\.random\._generator", "Generator"),
        (r"numpy\.random\.bit_generator", r"SeedSequence|__pyx_unpickle_\w+"),
        (r"scipy\.sparse(?:\._?\w+)?", "(?:csr|csc|coo|bsr|dia|dok|lil)_(?:matrix|array)"),
        (r"scipy\.interpolate(?:\._?\w+)?", "interp1d|BSpline|PPoly|CubicSpline|PchipInterpolator"),
        (r"pandas\.core\.frame", "DataFrame"),
        (r"pandas\.core\.series", "Series"),
        (r"pandas\.core\.indexes\.(?:base|range|multi|numeric|category|datetimes|interval)",
         "_new_Index|_new_DatetimeIndex|_new_IntervalIndex|Index|RangeIndex|MultiIndex|(?:Int64|UInt64|Float64)"
         "Index|CategoricalIndex|DatetimeIndex|IntervalIndex"),
        (r"pandas\.core\.internals\.managers", "BlockManager|SingleBlockManager"),
        (r"pandas\.core\.internals\.blocks", "new_block|ensure_block_shape"),
        (r"pandas\._libs\.internals", "_unpickle_block|BlockPlacement"),
        (r"pandas\._libs\.arrays", r"__pyx_unpickle_NDArrayBacked|NDArrayBacked"),
        (r"pandas\.core\.arrays\.(?:categorical|string_|numpy_|datetimes|integer|floating|boolean)",
         "Categorical|StringArray|NumpyExtensionArray|PandasArray|DatetimeArray|IntegerArray|FloatingArray"
         "|BooleanArray"),
        (r"pandas(?:\.core)?\.(?:api\.types|dtypes\.dtypes|arrays\.\w+)",
         "CategoricalDtype|DatetimeTZDtype|StringDtype|(?:U?Int(?:8|16|32|64)|Float(?:32|64)|Boolean)Dtype"),
        (r"pandas\._libs\.tslibs\.timestamps", "_unpickle_timestamp|Timestamp"),
        # pandas 3.1 names its classes by their public place. Text in pyarrow is not listed:
        # nothing checks its buffers.
        (r"pandas", "DataFrame|Series|Categorical|CategoricalDtype|Index|RangeIndex|MultiIndex"
         "|CategoricalIndex|DatetimeIndex|IntervalIndex|DatetimeTZDtype|StringDtype|Timestamp"
         "|(?:U?Int(?:8|16|32|64)|Float(?:32|64)|Boolean)Dtype"),
        (r"pandas\.arrays", "StringArray|NumpyExtensionArray|DatetimeArray|IntegerArray|FloatingArray"
         "|BooleanArray"),
        # Classes, wherever the version of the day keeps them; not what reads files, starts threads or opens
        # connections.
        (r"sklearn(?!(?:\.\w+)*\.(?:externals|tests?|datasets|conftest|inspection|_testing|_joblib|fixes|mocking"
         r"|parallel|callback|_mocking|_test_common|_build_utils|estimator_checks)(?:\.|\Z))(?:\.\w+)*",
         rf"(?!(?:Memory|Parallel|Path|Thread|ThreadPool|Popen|Process|Queue|Lock|StringIO|BytesIO|Template"
         rf"|Delayed|Client|Connection|Listener)\Z){_CLASS}|newObj|__pyx_unpickle_\w+"),
        # Default arguments of FunctionTransformer and similar classes.
        (r"sklearn\.feature_selection\._univariate_selection", "f_classif|f_regression|f_oneway|chi2"
         "|r_regression"),
        (r"sklearn\.feature_selection\._mutual_info", r"mutual_info_\w+"),
        (r"xgboost\.(?:sklearn|core)", "XGB(?:Model|Classifier|Regressor|Ranker|RFClassifier"
         "|RFRegressor)|Booster"),
        (r"lightgbm\.(?:sklearn|basic)", "LGBM(?:Model|Classifier|Regressor|Ranker)|Booster|_Booster"),
    )
)  # fmt: skip

_PICKLES: Final = frozenset({"pickle", "cloudpickle"})
_TEXTS: Final = frozenset(
    {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"}
)
_CHANGES: Final = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"})
_DESCRIBED: Final = {code.name: code for code in pickletools.opcodes}
#: The characters of a name for which the answer is remembered.
_SHORT: Final = 200
_UNKNOWN: Final = object()
_MARK: Final = object()


@dataclass(frozen=True)
class Name:
    """A name in a module, which a pickle looks up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def listed(self) -> bool:
        """Whether it is a class of a framework, or a function that only creates one."""
        short = len(self.module) + len(self.name) <= _SHORT
        return (_listed if short else _listed.__wrapped__)(self.module, self.name)


@lru_cache(maxsize=4096)
def _listed(module: str, name: str) -> bool:
    return any(m.match(module) and n.match(name) for m, n in _LISTED)


class NotProved(Exception):
    """It is unknown what the file executes. The message says why."""


@dataclass(frozen=True)
class Verdict:
    """`harmless`: loading the package executes only framework classes. `reason`: for an operator."""

    harmless: bool
    reason: str


def package(read: Package, most_bytes: int = MOST_BYTES) -> Verdict:
    """Whether loading a package executes only framework classes. Blocks. Scans no pickle larger than
    `most_bytes`. Raises OSError if a file cannot be read."""
    try:
        return _package(read, most_bytes)
    except PackageError as error:
        return Verdict(False, f"its files cannot be scanned: {error}")
    except NotProved as error:
        return Verdict(False, str(error))


def _package(read: Package, most_bytes: int) -> Verdict:
    if read.code is not None or read.text("loader_code") is not None:
        return Verdict(False, "it ships code")
    flavor = flavors.find(read)
    if flavor.trust == "data":
        return Verdict(True, f"its format ({flavor.name}) executes nothing")
    entry = read.flavors.get(flavor.name, {})
    if flavor.name == "sklearn":
        form = entry.get("serialization_format", "pickle")
        if form == "skops":
            # A bare file names no types: all that it holds are then trusted.
            if entry.get("skops_trusted_types") or read.bare:
                return Verdict(False, "its skops file needs types that skops does not trust by itself")
            return Verdict(True, "its skops file names trusted types alone")
        if form == "joblib":
            return Verdict(False, "a joblib file is more than a pickle and is not scanned")
        if form not in _PICKLES:
            return Verdict(False, f"the serialization format {form!r} is not known")
        file = read.data
        if not file.is_file():
            file = read.inside(read.text("model_path") or str(entry.get("pickled_model", "model.pkl")))
    elif flavor.name == "lightgbm":
        file = read.native_data("lightgbm")
        if entry.get("model_class", BOOSTER) == BOOSTER:
            return Verdict(True, "its format (lightgbm) executes nothing")
    else:
        return Verdict(False, f"its format ({flavor.name}) executes what its author wrote")
    return _pickle(file, most_bytes)


def _pickle(file: Path, most_bytes: int) -> Verdict:
    if file.stat().st_size > most_bytes:
        return Verdict(False, f"its pickle is larger than the {most_bytes} bytes that are scanned")
    with opcodes.opened(file) as handle:
        for name in names(handle):
            if not name.listed:
                return Verdict(False, f"its pickle names {str(name)[:200]}")
    return Verdict(True, "its pickle names only framework classes")


def names(pickled: bytes | IO[bytes]) -> Iterator[Name]:
    """Every name that a pickle looks up, in order, without executing anything. Raises NotProved."""
    machine = _Machine()
    handle = io.BytesIO(pickled) if isinstance(pickled, bytes) else pickled
    try:
        for count, (name, argument) in enumerate(opcodes.operations(handle)):
            if count >= MOST_OPERATIONS:
                raise NotProved(f"its pickle has more than {MOST_OPERATIONS} operations")
            found = machine.step(name, argument)
            if found is not None:
                yield found
    except NotProved:
        raise
    except Exception as error:  # noqa: BLE001  (a parser that was given anything at all)
        text = f"{type(error).__name__}: {error}"[:200]
        raise NotProved(f"its pickle cannot be scanned to its end ({text})") from None
    if handle.read(1):
        raise NotProved("its pickle cannot be scanned to its end: the file has bytes after it")


class _Machine:
    """The stack and the memo of an unpickler, with names, texts and unknowns for values."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> Name | None:
        """Performs one operation. Returns the name that it looks up, or None. Raises NotProved,
        LookupError."""
        stack = self._stack
        if name in _TEXTS:
            stack.append(argument if isinstance(argument, str) else _UNKNOWN)
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[int(argument)])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("GLOBAL", "INST"):
            return self._look_up(name, argument)
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            if not (isinstance(module, str) and isinstance(attribute, str)):
                raise NotProved("its pickle builds a name while it is loaded")
            return self._push(module, attribute)
        elif name in ("EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER"):
            raise NotProved(f"its pickle refers to an object outside the file ({name})")
        elif name == "OBJ":
            values = self._to_mark()
            if not values or not isinstance(values[0], Name):
                raise NotProved("its pickle calls an object that is made while it is loaded")
            stack.append(_UNKNOWN)
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            taken = 3 if name == "NEWOBJ_EX" else 2
            called = stack[-taken]
            del stack[-taken:]
            if not isinstance(called, Name):
                raise NotProved("its pickle calls an object that is made while it is loaded")
            stack.append(_UNKNOWN)
        elif name == "BUILD":
            stack.pop()
            if isinstance(stack[-1], Name):
                raise NotProved(f"its pickle changes {stack[-1]} for all")
        else:
            self._other(name)
        return None

    def _look_up(self, name: str, argument: str) -> Name:
        if name == "INST":
            self._to_mark()
        module, _, attribute = argument.partition(" ")
        found = self._push(module, attribute)
        if name == "INST":
            self._stack[-1] = _UNKNOWN
        return found

    def _push(self, module: str, attribute: str) -> Name:
        found = Name(module, attribute)
        self._stack.append(found)
        return found

    def _to_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise LookupError("no mark")
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values

    def _other(self, name: str) -> None:
        """Any other operation: pops and pushes as its description says."""
        to_mark, taken, given = _effect(name)
        if to_mark:
            self._to_mark()
        if taken:
            if taken > len(self._stack):
                raise LookupError("the stack is empty")
            if name in _CHANGES and isinstance(self._stack[-taken], Name):
                raise NotProved(f"its pickle changes {self._stack[-taken]} for all")
            del self._stack[-taken:]
        self._stack.extend(given)


@lru_cache(maxsize=None)
def _effect(name: str) -> tuple[bool, int, tuple[Any, ...]]:
    """What an operation does to the stack: whether it takes all down to a mark, how many values it takes
    then, and what it puts there. Raises LookupError."""
    code = _DESCRIBED[name]
    before = [kind.name for kind in code.stack_before]
    to_mark = "mark" in before
    taken = before.index("mark") if to_mark else len(before)
    return to_mark, taken, (_UNKNOWN,) * len(code.stack_after)
