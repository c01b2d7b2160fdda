"""A package, the directory with an `MLmodel` file: reads, checks, writes, measures and hashes it.

A package is untrusted. `yamltext` reads `MLmodel` within limits, and every path in it is confined to the
directory. This module imports no framework, runs no code of the package and must not know flavors. Only the
process that reads packages needs PyYAML; a worker receives the parsed mapping (`to_json`, `from_json`).

Source of the format: MLflow's `MLmodel` file, versions 1 to 3.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Final

from loaders import bare
from loaders import example as examples
from loaders.compat.pythons import is_below
from loaders.files import PackageError as PackageError
from loaders.files import listed, whole
from loaders.yamltext import kind_of, parse_yaml

if TYPE_CHECKING:
    from loaders.enforcement import RawInput
    from loaders.example import ExampleInfo
    from loaders.signature import Signature

FILE: Final = "MLmodel"
PYTHON_FUNCTION: Final = "python_function"

#: The bytes of the largest file that describes an environment.
MAX_SIDE_BYTES: Final = 1 << 20

_MAX_BYTES: Final = 16 << 20
#: A file is read in pieces of its own size, within these bounds.
_LEAST: Final = 1 << 16
_BLOCK: Final = 1 << 20


@dataclass(frozen=True)
class Package:
    """A model directory and the contents of its `MLmodel`. `raw` is the whole file, JSON-ready, with unknown
    fields; the other fields are the parts in use. `type_hints`: the signature comes from Python type hints,
    and the model checks its input itself (MLflow's `is_signature_from_type_hint`)."""

    path: Path
    raw: dict[str, Any]
    python_function: dict[str, Any]
    flavors: dict[str, dict[str, Any]]
    signature: Signature | None
    metadata: dict[str, Any]
    example: ExampleInfo | None
    model_id: str | None
    run_id: str | None
    utc_time_created: str | None
    mlflow_version: str | None
    type_hints: bool

    @property
    def loader_module(self) -> str:
        """Returns the module that MLflow imports to load this package. It determines the flavor."""
        return str(self.python_function["loader_module"])

    @property
    def bare(self) -> str | None:
        """Returns the name of the model file if there is no `MLmodel`; `raw` is then derived from that
        name."""
        return _text(self.raw, bare.KEY)

    @property
    def config(self) -> dict[str, Any]:
        """Returns the model config from saving. Only its keys can be overridden."""
        return self._mapping("config")

    @property
    def artifacts(self) -> dict[str, Path]:
        """Returns the files saved with a Python model, by name, confined to the package. Raises
        PackageError."""
        found: dict[str, Path] = {}
        for name, entry in self._mapping("artifacts").items():
            path = entry.get("path") if isinstance(entry, dict) else None
            if not isinstance(path, str):
                raise PackageError(f"{PYTHON_FUNCTION}.artifacts.{name}", "has no path")
            found[name] = self.inside(path)
        return found

    @property
    def code(self) -> Path | None:
        """Returns the directory of modules in the package; None if there is none. Raises PackageError."""
        code = self.text("code")
        return None if code is None else self.inside(code)

    @property
    def data(self) -> Path:
        """Returns the path that MLflow passes to the loader: the entry `data`, else the directory itself."""
        data = self.text("data")
        return self.path if data is None else self.inside(data)

    def native_data(self, flavor: str) -> Path:
        """Returns the file or directory in the framework's format: the flavor's entry `data`, else `data`
        above. Raises PackageError."""
        data = self.flavors.get(flavor, {}).get("data")
        return self.inside(data) if isinstance(data, str) and data else self.data

    def text(self, key: str) -> str | None:
        """Returns an entry of `python_function` that must be text; None if absent. Raises PackageError."""
        value = self.python_function.get(key)
        if value is None or isinstance(value, str):
            return value or None
        raise PackageError(f"{PYTHON_FUNCTION}.{key}", f"must be text, not {kind_of(value)}")

    def inside(self, relative: str) -> Path:
        """Returns the absolute path of an existing file or directory of the package. Raises PackageError for
        an absolute path, a path with `..`, and a link that leads out of the package."""
        shown = relative if len(relative) <= 200 else relative[:197] + "..."
        pure = PurePosixPath(relative)
        if not relative or "\0" in relative or pure.is_absolute() or PureWindowsPath(relative).drive:
            raise PackageError(shown or "path", "a path in a package must be relative to it")
        if ".." in pure.parts or ".." in PureWindowsPath(relative).parts:
            raise PackageError(shown, "a path in a package must not leave it")
        if "\\" in relative and not (self.path / pure).exists():
            # The path was written on Windows. Its target is checked below like any other.
            pure = PurePosixPath(relative.replace("\\", "/").lstrip("/"))
        try:
            found = _followed(self.path, pure.parts)
        except FileNotFoundError:
            raise PackageError(shown, "there is no such file in the package") from None
        except (OSError, RuntimeError):
            raise PackageError(shown, "cannot be read") from None
        if not is_below(found, self.path):
            raise PackageError(shown, "is a link that leaves the package")
        return self.path / pure

    def content(self, relative: str, most: int = MAX_SIDE_BYTES) -> bytes:
        """Returns the content of a small file next to `MLmodel`. Raises PackageError, also for a file of more
        than `most` bytes."""
        file = self.inside(relative)
        if not file.is_file():
            raise PackageError(relative, "is not a file")
        if (found := whole(file, most)) is None:
            raise PackageError(relative, f"is larger than {most >> 20} MiB")
        return found

    def example_input(self, most: int | None = None) -> tuple[RawInput | None, dict[str, Any] | None]:
        """Returns the saved input example in the form of a request, and its params; (None, None) if there is
        none. Raises PackageError if the named example is missing or malformed, or larger than `most`
        bytes."""
        if self.example is None:
            return None, None
        try:
            return examples.read(self.example, self.inside(self.example.artifact_path), most)
        except examples.InvalidExample as error:
            raise PackageError("saved_input_example_info", str(error)) from error

    def to_json(self) -> dict[str, Any]:
        """Returns the input of `from_json`, which reads the package in a process without a YAML parser."""
        return self.raw

    @classmethod
    def from_json(cls, raw: dict[str, Any], path: str | Path) -> Package:
        """Returns the package in the directory `path` whose parsed `MLmodel` is `raw`. Raises
        PackageError."""
        return cls.of(raw, Path(path).resolve())

    @classmethod
    def of(cls, raw: dict[str, Any], path: Path) -> Package:
        """Returns the same for a path without links."""
        from loaders.signature import Signature, SignatureError

        flavors = raw.get("flavors")
        if not isinstance(flavors, dict):
            raise PackageError("flavors", "an MLmodel file must list its flavors")
        flavors = {name: entry if isinstance(entry, dict) else {} for name, entry in flavors.items()}
        python_function = flavors.get(PYTHON_FUNCTION)
        metadata = raw.get("metadata") or {}
        if not isinstance(metadata, dict):
            raise PackageError("metadata", f"must be a mapping, not {kind_of(metadata)}")
        if metadata.get("mlflow.model.isExternal") is True:
            raise PackageError(
                "metadata",
                "the model's files are kept elsewhere (mlflow.model.isExternal): it cannot be loaded",
            )
        if python_function is None:
            named = ", ".join(sorted(flavors)) or "none"
            raise PackageError(
                "flavors", f"the python_function flavor is missing, so it cannot be served; flavors: {named}"
            )
        loader_module = python_function.get("loader_module")
        if not isinstance(loader_module, str) or not all(p.isidentifier() for p in loader_module.split(".")):
            raise PackageError(f"{PYTHON_FUNCTION}.loader_module", "must be the name of a module")
        signature = None
        if (entry := raw.get("signature")) is not None:
            if not isinstance(entry, dict):
                raise PackageError("signature", f"must be a mapping, not {kind_of(entry)}")
            try:
                signature = Signature.from_json(entry)
            except SignatureError as error:
                raise PackageError("signature", str(error)) from error
        example = None
        if (info := raw.get("saved_input_example_info")) is not None:
            try:
                example = examples.ExampleInfo.from_json(info)
            except examples.InvalidExample as error:
                raise PackageError("saved_input_example_info", str(error)) from error
        package = cls(
            path=path,
            raw=raw,
            python_function=python_function,
            flavors=flavors,
            signature=signature,
            metadata=metadata,
            example=example,
            model_id=_text(raw, "model_id"),
            run_id=_text(raw, "run_id"),
            utc_time_created=_text(raw, "utc_time_created"),
            mlflow_version=_text(raw, "mlflow_version"),
            type_hints=raw.get("is_signature_from_type_hint") is True,
        )
        # Check once here, so that a package with paths outside its directory is refused before loading.
        _ = package.config, package.artifacts, package.code, package.data
        return package

    def _mapping(self, key: str) -> dict[str, Any]:
        value = self.python_function.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise PackageError(f"{PYTHON_FUNCTION}.{key}", f"must be a mapping, not {kind_of(value)}")
        return value

    def __repr__(self) -> str:
        return f"<Package {self.path.name}: {self.loader_module}>"


def read(path: str | Path) -> Package:
    """Reads a model directory. Without an `MLmodel`, the directory must contain one model file (`bare`).
    `path` may also be such a file; the package is then its parent directory. Raises PackageError if this is
    not a model directory, or one that must be refused."""
    root = Path(path).resolve()
    file = root / FILE
    if bare.is_bare(root) and root.is_file() and (said := bare.described(root.parent, root.name)) is not None:
        return Package.of(said, root.parent)
    try:
        if not is_below(_followed(root, (FILE,)), root):
            raise PackageError(FILE, "is a link that leaves the package")
        if (text := whole(file, _MAX_BYTES)) is None:
            raise PackageError(FILE, f"is larger than {_MAX_BYTES >> 20} MiB")
    except (FileNotFoundError, NotADirectoryError):
        if root.is_dir() and not os.path.lexists(file) and (said := bare.described(root)) is not None:
            return Package.of(said, root)
        if not root.is_dir():
            # An absolute path would reveal this machine's directories.
            shown = root.name if Path(path).is_absolute() else str(path)
            problem = "is not a directory" if root.exists() else "there is no such directory"
            raise PackageError(shown, problem) from None
        deeper = sorted(file.parent.name for file in root.glob(f"*/{FILE}"))[:3]
        hint = f"; there is one in {', '.join(deeper)}: name that directory" if deeper else ""
        raise PackageError(FILE, f"there is no such file: this is not a model directory{hint}") from None
    except (OSError, RuntimeError) as error:
        raise PackageError(
            FILE, f"cannot be read: {getattr(error, 'strerror', None) or 'a loop of links'}"
        ) from None
    raw = parse_yaml(text, FILE)
    if not isinstance(raw, dict):
        raise PackageError(FILE, f"must be a mapping, not {kind_of(raw)}")
    return Package.of(raw, root)


def write(
    directory: Path,
    flavors: Mapping[str, Mapping[str, Any]],
    *,
    signature: Signature | None = None,
    metadata: Mapping[str, Any] | None = None,
    example: ExampleInfo | None = None,
) -> Package:
    """Writes `MLmodel` into a directory that already contains the flavors' files, and reads it back."""
    from datetime import datetime, timezone

    import yaml

    created = datetime.now(timezone.utc).replace(tzinfo=None)
    raw: dict[str, Any] = {
        "flavors": {name: dict(entry) for name, entry in flavors.items()},
        "utc_time_created": created.isoformat(sep=" ", timespec="microseconds"),
    }
    if signature is not None:
        raw["signature"] = signature.to_json()
    if metadata:
        raw["metadata"] = dict(metadata)
    if example is not None:
        raw["saved_input_example_info"] = example.to_json()
    try:
        text = yaml.safe_dump(raw, allow_unicode=True)
    except yaml.representer.RepresenterError as error:
        raise PackageError("metadata", f"cannot be written as YAML: {error.args[-1]!r}") from None
    (directory / FILE).write_text(text, encoding="utf-8")
    return read(directory)


def digest(path: str | Path) -> str:
    """Returns the digest `sha256:<hex>` of a package.

    It is the SHA-256 over the sorted lines `<sha256> <size> <path>`, each with a newline, of the regular
    files, without `__pycache__` and MLflow's `registered_model_meta`. A link to a file inside counts as that
    file, because a copy contains the file. Links out of the package and links to directories, which a copy
    would not contain, raise PackageError.
    """
    return digest_of(listed(Path(path).resolve()))


def digest_of(files: Iterable[tuple[str, str, int]], hashed: Mapping[str, str] | None = None) -> str:
    """Returns the digest of a package with these files (path in the package, file, bytes). `hashed` has the
    SHA-256, in hexadecimal, of files that the caller has hashed already, by their paths in the package: of
    these the bytes are taken from `files`. The others are read. Raises OSError."""
    lines = []
    for relative, file, size in files:
        known = None if hashed is None else hashed.get(relative)
        if known is None:
            known, size = _hashed(file, size)
        lines.append(f"{known} {size} ".encode() + os.fsencode(relative) + b"\n")
    return "sha256:" + hashlib.sha256(b"".join(sorted(lines))).hexdigest()


def _hashed(file: str, expected: int) -> tuple[str, int]:
    """The SHA-256 of a file, and its bytes. `expected`: how many they were when it was listed."""
    content = hashlib.sha256()
    size = 0
    step = min(max(expected + 1, _LEAST), _BLOCK)
    with open(file, "rb", buffering=0) as handle:
        while block := handle.read(step):
            content.update(block)
            size += len(block)
    return content.hexdigest(), size


def files_bytes(path: str | Path) -> int:
    """Returns the total bytes of the files that `digest` covers."""
    return sum(size for _, _, size in listed(Path(path).resolve()))


def _followed(root: Path, parts: Iterable[str]) -> Path:
    """Where a path in a package leads. `root` has no links in its path. Raises OSError, and RuntimeError for
    links that lead to themselves."""
    place = root
    for part in parts:
        place = place / part
        if stat.S_ISLNK(os.lstat(place).st_mode):
            return root.joinpath(*parts).resolve(strict=True)
    return place


def _text(raw: Mapping[str, Any], key: str) -> str | None:
    value = raw.get(key)
    return None if value is None else str(value)
