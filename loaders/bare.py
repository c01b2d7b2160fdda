"""Model files without an `MLmodel`: finds their flavor by the file's name and its first bytes.

A directory without an `MLmodel` is also a package if it contains one such file: the only one, or the one
named `model`. Reads at most a few kilobytes of it. Its signature is known after loading (`Predictor.stated`),
because only its own framework can read it. Executes nothing.

Source of the names: the predictors of KServe (`model.joblib`, `model.bst`, …) and of each framework.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from loaders.compat.pythons import is_below
from loaders.files import PackageError

#: The key in the place of `MLmodel` that names the file.
KEY: Final = "bare_file"
ENDINGS: Final = (".joblib", ".pkl", ".skops", ".onnx", ".bst", ".json", ".ubj", ".cbm", ".txt", ".pt2")

_STEM: Final = "model"
_HEAD: Final = 4096
_XGBOOST_JSON: Final = re.compile(rb'\s*\{\s*"(learner|version)"\s*:')
_CATBOOST_JSON: Final = re.compile(
    rb'\s*\{\s*"(ctr_data|features_info|model_info|oblivious_trees|trees|scale_and_bias)"\s*:'
)
_LIGHTGBM: Final = re.compile(rb"tree\r?\n")


def is_bare(path: Path) -> bool:
    """Returns True if a file has the name of a bare model file."""
    return path.suffix.lower() in ENDINGS


def find(root: Path) -> str | None:
    """The name of the model file in a directory; None if it holds none. Raises PackageError if it holds
    several."""
    names = sorted(entry.name for entry in root.iterdir() if is_bare(entry) and entry.is_file())
    named = [name for name in names if Path(name).stem == _STEM]
    candidates = named or [name for name in names if len(names) == 1 or _fits(root / name)]
    if len(candidates) > 1:
        raise PackageError(
            "the directory", f"holds several model files: {', '.join(candidates[:5])}; name one of them"
        )
    return candidates[0] if candidates else None


def described(root: Path, name: str | None = None) -> dict[str, Any] | None:
    """What an `MLmodel` for the model file in a directory says; None if it holds none. `name`: the file that
    the user named, which may be a link. Raises PackageError for a file whose content is of no kind that its
    name allows."""
    named = name is not None
    try:
        name = find(root) if name is None else name
    except OSError as error:
        raise PackageError("the directory", f"cannot be read: {error.strerror}") from None
    if name is None:
        return None
    file = root / name
    if not named and not is_below(file.resolve(), root):
        raise PackageError(name, "is a link that leaves the package")
    try:
        with file.open("rb") as handle:
            head = handle.read(_HEAD)
    except OSError as error:
        raise PackageError(name, f"cannot be read: {error.strerror}") from None
    flavor, function, entry = _flavor(name, head)
    return {
        KEY: name,
        "flavors": {"python_function": {"loader_module": f"mlflow.{flavor}", **function}, flavor: entry},
    }


def _fits(file: Path) -> bool:
    """Returns True if a file's content matches its name: `requirements.txt` is not a LightGBM model."""
    try:
        with file.open("rb") as handle:
            _flavor(file.name, handle.read(_HEAD))
    except (OSError, PackageError):
        return False
    return True


def _flavor(name: str, head: bytes) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(flavor, entries under `python_function`, entries of the flavor)."""
    if not head:
        raise PackageError(name, "is empty")
    ending = Path(name).suffix.lower()
    data = {"data": name}
    if ending in (".joblib", ".pkl", ".skops"):
        form = "skops" if ending == ".skops" else "joblib"
        _must(ending != ".skops" or head.startswith(b"PK"), name, "a skops file, which is a zip archive")
        return "sklearn", {"model_path": name}, {"pickled_model": name, "serialization_format": form}
    if ending == ".onnx":
        return "onnx", data, dict(data)
    if ending == ".pt2":
        _must(head.startswith(b"PK"), name, "an exported program of PyTorch, which is a zip archive")
        return "pytorch", data, {"model_data": name}
    if ending == ".cbm" or (ending == ".json" and _CATBOOST_JSON.match(head)):
        _must(ending == ".json" or head.startswith(b"CBM1"), name, "a model of CatBoost")
        return "catboost", data, {**data, "save_format": ending[1:]}
    if ending in (".txt", ".bst") and _LIGHTGBM.match(head):
        return "lightgbm", data, dict(data)
    _must(ending != ".txt", name, "a model of LightGBM, whose text begins with the line `tree`")
    _must(ending != ".json" or bool(_XGBOOST_JSON.match(head)), name, "a model of XGBoost or CatBoost")
    _must(ending != ".ubj" or (head[:1] == b"{" and b"learner" in head), name, "a model of XGBoost in UBJSON")
    return "xgboost", data, dict(data)


def _must(fits: bool, name: str, kind: str) -> None:
    if not fits:
        raise PackageError(name, f"is not {kind}")
