"""Judges what a package's model file executes when it is loaded, by the file and the operator's list.

If `unsafe_formats` refuses code, the name of a format does not decide. A skops file counts as data if it
holds only types that skops itself trusts or the operator names. An exported PyTorch program loads if the
operator accepts the format and the file holds no pickles and no compiled code. Deserialises only JSON. Must
not know the policy of a version.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loaders import opcodes
from loaders.flavors.lightgbm import BOOSTER
from loaders.flavors.pytorch import exported_program
from loaders.package import Package, PackageError

if TYPE_CHECKING:
    from loaders.flavors.base import Flavor

PT2: Final = "pt2"
SKOPS: Final = "skops:"

_MAX_JSON: Final = 16 << 20  # in memory it takes up to 20 times that
_MAX_INPUTS: Final = 64 << 20
_MAX_PICKLE: Final = 1 << 20  # it holds the shapes of tensors, not their values
_MAX_READ: Final = 128 << 20
# skops itself decides which of their members it trusts, when it loads with only the operator's list.
_TRUSTED_ROOTS: Final = frozenset({"builtins", "collections", "numpy", "scipy", "sklearn", "datetime"})
_PT2_MEMBERS: Final = re.compile(
    r"(models/[\w.-]+\.json|data/weights/(weight_\d+|[\w.-]+_config\.json)|data/constants/(tensor_\d+|[\w.-]+"
    r"_config\.json)|data/sample_inputs/[\w.-]+\.pt|archive_format|archive_version|version|byteorder"
    r"|\.data/(version|serialization_id)|\.format_version|\.storage_alignment)\Z"
)


_NOT_READ: Final = ("data/weights/weight_", "data/constants/tensor_")
"""The values of tensors, which are never read here."""


class Unsafe(Exception):
    """Loading a file executes code, or may execute code. The message names its format and its content; it is
    safe to show to clients."""


def judged(package: Package, flavor: Flavor, accepted: Sequence[str]) -> Package:
    """The package in the form that may be loaded when code is refused. `accepted`: the operator's list, with
    `pt2` or `skops:` and the pattern of a type. Raises Unsafe, and PackageError for a file that cannot be
    read."""
    if flavor.trust == "data":
        return package
    entry = package.flavors.get(flavor.name, {})
    if entry.get("serialization_format") == "skops":
        return _judged_skops(package, flavor.name, accepted)
    if flavor.name == "pytorch" and (exported := exported_program(package)) is not None:
        _judge_pt2(exported, accepted)
        return package
    if flavor.name == "lightgbm" and entry.get("model_class", BOOSTER) == BOOSTER:
        return package  # LightGBM's own text
    form = entry.get("serialization_format") or ("pickle" if flavor.name == "pytorch" else None)
    name = f"{flavor.name}, {form}" if form else flavor.name
    raise Unsafe(f"its format ({name}) executes code when it is loaded, and unsafe_formats refuses that")


def _judged_skops(package: Package, flavor: str, accepted: Sequence[str]) -> Package:
    named = [entry.removeprefix(SKOPS) for entry in accepted if entry.startswith(SKOPS)]
    found = set(_skops_types(_skops_file(package, flavor)))
    trusted = sorted(kind for kind in found if any(fnmatchcase(kind, pattern) for pattern in named))
    unknown = sorted(found - set(trusted) - {kind for kind in found if kind.split(".")[0] in _TRUSTED_ROOTS})
    if unknown:
        shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise Unsafe(
            f"its format ({flavor}, skops) holds untrusted types: {shown}; unsafe_formats refuses "
            f"them unless accepted_formats names them, such as {SKOPS}{unknown[0]}"
        )
    # The operator's list replaces the package's own list of trusted types.
    raw = json.loads(json.dumps(package.to_json()))
    raw["flavors"][flavor]["skops_trusted_types"] = trusted
    return Package.from_json(raw, package.path)


def _skops_file(package: Package, flavor: str) -> Path:
    entry = package.flavors.get(flavor, {})
    file = package.native_data(flavor)
    if file.is_file():
        return file
    return package.inside(package.text("model_path") or str(entry.get("pickled_model", "model.pkl")))


def _skops_types(file: Path) -> Iterator[str]:
    with _archive(file, "skops") as archive:
        schema = _json(archive, "schema.json")
    for node in _objects(schema):
        for module, name in (("__module__", "__class__"), ("module_path", "function")):
            if isinstance(node.get(module), str) and isinstance(node.get(name), str):
                yield f"{node[module]}.{node[name]}"


def _judge_pt2(file: Path, accepted: Sequence[str]) -> None:
    if PT2 not in accepted:
        raise Unsafe(
            f"its format (pytorch, {PT2}) is an exported program; unsafe_formats refuses it unless "
            f"accepted_formats contains {PT2}"
        )
    with _archive(file, PT2) as archive:
        names = archive.namelist()
        read = [one for one in archive.infolist() if not one.filename.partition("/")[2].startswith(_NOT_READ)]
        if sum(one.file_size for one in read) > _MAX_READ:
            raise Unsafe(f"its format (pytorch, {PT2}) holds more than can be checked")
        for name, times in Counter(names).items():
            inner = name.partition("/")[2]
            if not _PT2_MEMBERS.match(inner) or times > 1:
                raise Unsafe(
                    f"its format (pytorch, {PT2}) holds {name[:80]!r}, which executes code or is unknown"
                )
            configured = inner.startswith("data/") and name.endswith(".json")
            if configured and any(node.get("use_pickle") for node in _objects(_json(archive, name))):
                raise Unsafe(f"its format (pytorch, {PT2}) holds a pickle ({name[:80]!r}): it executes code")
            if inner.startswith("models/"):
                _judge_program(_json(archive, name))
            if inner.startswith("data/sample_inputs/"):
                _judge_tensors(archive, name)


def _judge_program(program: Any) -> None:
    """Checks everything that torch evaluates as Python: size expressions, guards, and names in its code."""
    for node in _objects(program):
        for key, value in node.items():
            texts = value if key == "guards_code" and isinstance(value, list) else [value]
            if key in ("expr_str", "guards_code"):
                for text in texts:
                    if text and (not isinstance(text, str) or not _EXPRESSION.match(text) or "__" in text):
                        raise Unsafe(f"its format (pytorch, {PT2}) holds an expression that executes code")
            elif key == "target" and isinstance(value, str) and not _TARGET.match(value):
                raise Unsafe(
                    f"its format (pytorch, {PT2}) calls {value[:80]!r}, which is not an operator of torch"
                )
            elif key == "name" and isinstance(value, str) and not _NAME.match(value):
                raise Unsafe(f"its format (pytorch, {PT2}) holds {value[:80]!r}, which is not a valid name")


def _judge_tensors(archive: zipfile.ZipFile, name: str) -> None:
    """Checks the example inputs of a program, a pickle of tensors: reads its globals without resolving
    them."""
    if not archive.getinfo(name).file_size:
        return
    if archive.getinfo(name).file_size > _MAX_INPUTS:
        raise Unsafe(f"its format (pytorch, {PT2}) holds example inputs that are too large to check")
    try:
        with archive.open(name) as member:
            content = member.read(_MAX_INPUTS)
        plain = content[:4] == b"PK\x03\x04" and _only_tensors(content)
    except opcodes.DAMAGED:
        plain = False
    if not plain:
        raise Unsafe(
            f"its format (pytorch, {PT2}) holds example inputs ({name[:80]!r}) that are not only tensors"
        )


def _only_tensors(content: bytes) -> bool:
    """Whether a file of torch holds nothing but tensors. Raises what opcodes.DAMAGED lists."""
    with opcodes.archived(io.BytesIO(content)) as inner:
        members = inner.namelist()
        pickles = [member for member in members if member.endswith("/data.pkl")]
        if len(set(members)) < len(members) or len(pickles) > 1:
            return False
        if not all(_TENSOR_MEMBERS.match(member.partition("/")[2]) for member in members):
            return False
        if any(inner.getinfo(member).file_size > _MAX_PICKLE for member in pickles):
            return False
        for member in pickles:
            with inner.open(member) as handle:
                pickled = handle.read(_MAX_PICKLE)
            for name, argument in opcodes.operations(io.BytesIO(pickled)):
                if name in _OTHER_GLOBALS:
                    return False
                if name == "GLOBAL" and not _TENSOR_GLOBALS.match(str(argument)):
                    return False
    return True


_EXPRESSION: Final = re.compile(
    r"(?:\s|\d|[-+*/%(),<>=!&|~\[\]'\".]|\b(?:[suz]\d+|Symbol|positive|integer|nonnegative|True|False|Integer|Float|Rational"
    r"|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|ModularIndexing|Where|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|and|or|not"
    r"|oo|int_oo|floor|ceiling|L|args|kwargs|size|shape)\b)*\Z"
)
_TARGET: Final = re.compile(
    r"(torch\.ops\.\w+\.\w+(\.\w+)?|torch\.sym_\w+|_operator\.\w+|math\.\w+|[A-Za-z_]\w*)\Z"
)
_NAME: Final = re.compile(r"[\w.]*\Z")
_TENSOR_MEMBERS: Final = re.compile(
    r"(data\.pkl|byteorder|version|data/\d+|\.data/serialization_id|\.format_version|\.storage_alignment)\Z"
)
_TENSOR_GLOBALS: Final = re.compile(
    r"(torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)|collections OrderedDict|torch \w+Storage)\Z"
)
_OTHER_GLOBALS: Final = frozenset({"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"})


@contextmanager
def _archive(file: Path, form: str) -> Iterator[zipfile.ZipFile]:
    try:
        handle = file.open("rb")
    except OSError:
        raise PackageError(file.name, f"is not a {form} file") from None
    with handle:
        try:
            opened = opcodes.archived(handle)
        except (OSError, *opcodes.DAMAGED):
            raise PackageError(file.name, f"is not a {form} file") from None
        with opened as archive:
            yield archive


def _json(archive: zipfile.ZipFile, name: str) -> Any:
    try:
        if archive.getinfo(name).file_size > _MAX_JSON:
            raise PackageError(name, f"is larger than {_MAX_JSON >> 20} MiB")
        with archive.open(name) as member:
            return json.loads(member.read(_MAX_JSON))
    except opcodes.DAMAGED:
        raise PackageError(name, "cannot be read: it should be JSON in the model's archive") from None


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object within a value."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield item
            pending += item.values()
        elif isinstance(item, list):
            pending += item
