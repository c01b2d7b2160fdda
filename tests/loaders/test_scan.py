"""What loading a package executes, told from its files. Hostile pickles are written by hand, and none is
loaded here."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import cloudpickle
import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.svm import SVC

import loaders
from loaders import scan
from loaders.package import read

FRAME, TARGET = load_iris(return_X_y=True, as_frame=True)
ESTIMATOR = b"csklearn.linear_model._base\nLinearRegression\n"


def text(value: str) -> bytes:
    data = value.encode()
    return b"\x8c" + bytes([len(data)]) + data


HARMLESS: dict[str, Any] = {
    "linear": LogisticRegression(max_iter=2000),
    "forest": RandomForestClassifier(3),
    "boosted": HistGradientBoostingClassifier(max_iter=3),
    "neighbours": KNeighborsClassifier(),
    "kernel": SVC(),
    "pipeline": make_pipeline(
        FunctionTransformer(np.log1p),
        make_column_transformer((StandardScaler(), list(FRAME.columns[:2])), remainder="passthrough"),
        LogisticRegression(max_iter=2000),
    ),
    "search": GridSearchCV(LogisticRegression(max_iter=2000), {"C": [0.1, 1.0]}, cv=2),
}


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_what_scikit_learn_fits_is_harmless(name: str, protocol: int) -> None:
    model = HARMLESS[name].fit(FRAME, TARGET)
    for pickled in (pickle.dumps(model, protocol), cloudpickle.dumps(model, protocol)):
        assert [str(found) for found in scan.names(pickled) if not found.listed] == []


def test_what_holds_texts_and_tables_is_harmless() -> None:
    text = pd.Series(["t", None], dtype=object)
    table = pd.DataFrame(
        {"a": pd.Categorical(pd.Series(["x", "y"], dtype=object)), "b": [1, 2], "c": text}
    ).set_index("b")
    table.columns = pd.Index(table.columns, dtype=object)
    for value in (TfidfVectorizer().fit(["aa bb", "bb cc"]), OneHotEncoder().fit([["a"], ["b"]]), table):
        assert [str(found) for found in scan.names(pickle.dumps(value)) if not found.listed] == []


def doubled(values: Any) -> Any:
    return values * 2


class Custom(LogisticRegression):  # type: ignore[misc]
    pass


def _until_it_stops(pickled: bytes) -> list[scan.Name]:
    found = []
    with suppress(scan.NotProved):
        found.extend(scan.names(pickled))
    return found


@pytest.mark.parametrize("value", [doubled, Custom(), FunctionTransformer(doubled), lambda x: x])
def test_own_python_is_not(value: Any) -> None:
    for dump in (pickle.dumps, cloudpickle.dumps):
        try:
            pickled = dump(value)
        except (pickle.PicklingError, AttributeError):
            continue
        assert [found for found in _until_it_stops(pickled) if not found.listed]


NAMED = {
    "a call of the system": (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
    "by its other name": (b"cposix\nsystem\n(S'true'\ntR.", "posix.system"),
    "by INST": (b"(S'true'\nios\nsystem\n.", "os.system"),
    "by OBJ": (b"(cos\nsystem\nS'true'\no.", "os.system"),
    "eval": (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"),
    "getattr": (b"cbuiltins\ngetattr\n.", "builtins.getattr"),
    "a name that is looked up and thrown away": (b"cos\nsystem\n0N.", "os.system"),
    "a name of names": (
        b"\x80\x04" + text("sklearn.base") + text("BaseEstimator.get_params") + b"\x93.",
        "sklearn.base.BaseEstimator.get_params",
    ),
    "two texts on the stack": (b"\x80\x04" + text("os") + text("system") + b"\x93.", "os.system"),
    "texts from the memo": (
        b"\x80\x04" + text("os") + b"q\x070" + text("system") + b"q\x080h\x07h\x08\x93.",
        "os.system",
    ),
    "a memo that is written twice": (
        b"\x80\x04" + text("sklearn.base") + b"q\x000" + text("os") + b"q\x000" + text("system") + b"q\x01"
        b"0h\x00h\x01\x93.",
        "os.system",
    ),
    "a memo by its order": (
        b"\x80\x04" + text("os") + b"\x940" + text("system") + b"\x940h\x00h\x01\x93.",
        "os.system",
    ),
    "a copy on the stack": (b"\x80\x04" + text("os") + text("system") + b"20\x93.", "os.system"),
    "a pickle within": (b"cpickle\nloads\n(C\x01.tR.", "pickle.loads"),
    "what scikit-learn imports": (b"csklearn.externals._arff\nLOADER\n.", "sklearn.externals._arff.LOADER"),
    "what reads files": (b"cnumpy\nload\n.", "numpy.load"),
    "what starts threads": (b"csklearn.utils.parallel\nParallel\n.", "sklearn.utils.parallel.Parallel"),
    "what opens connections": (
        b"csklearn.callback._transport\nConnection\n(I3\ntR.",
        "sklearn.callback._transport.Connection",
    ),
    "what is named alike": (b"csklearnx.base\nBaseEstimator\n.", "sklearnx.base.BaseEstimator"),
}  # fmt: skip


@pytest.mark.parametrize("how", NAMED)
def test_a_name_is_found_however_it_is_written(how: str) -> None:
    pickled, expected = NAMED[how]
    assert expected in [str(found) for found in scan.names(pickled) if not found.listed]


#: The origins of harmless names that modules of scikit-learn import.
PURE = {
    "sklearn", "numpy", "scipy", "pandas", "abc", "builtins", "collections", "inspect", "numbers", "typing",
    "enum", "View", "_cyutility",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # importing a deprecated module warns
def test_no_listed_name_leads_out_of_scikit_learn() -> None:
    """Modules import what they need, and each imported class is a name in the module, too."""
    foreign = set()
    for found in pkgutil.walk_packages(sklearn.__path__, "sklearn."):
        # Importing a module of `experimental` changes others.
        if ".experimental" in found.name or not scan.Name(found.name, "LinearRegression").listed:
            continue
        try:
            module = importlib.import_module(found.name)
        except ImportError:
            continue  # it needs a library that is not installed
        for name, value in vars(module).items():
            if callable(value) and scan.Name(found.name, name).listed:
                origin = getattr(value, "__module__", None) or type(value).__module__
                if origin.partition(".")[0] not in PURE:
                    foreign.add(f"{found.name}.{name}")
    assert foreign == set()


NOT_PROVED = {
    "a name that is made on the way": (
        b"\x80\x04" + text("os") + b"cbuiltins\nstr\n" + text("system") + b"\x85R\x93.",
        "builds a name",
    ),
    "a call of what was made": (ESTIMATOR + b")R)R.", "calls an object that is made"),
    "a change of a class": (ESTIMATOR + b"N}" + text("predict") + b"Ns\x86b.", "changes"),
    "items put into a class": (ESTIMATOR + text("a") + b"Ns.", "changes"),
    "the registry of extensions": (b"\x82\x01.", "EXT1"),
    "a persistent id": (b"Pabc\n.", "PERSID"),
    "a persistent id from the stack": (b"NQ.", "BINPERSID"),
    "a buffer from elsewhere": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "bytes behind the end": (b"N.N.", "bytes after"),
    "no end": (b"N", "cannot be scanned"),
    "an unknown operation": (b"\xff.", "cannot be scanned"),
    "an empty stack": (b"R.", "cannot be scanned"),
    "a memo that was never written": (b"h\x05.", "cannot be scanned"),
    "a length that lies": (b"\x8e" + struct.pack("<Q", 1 << 60) + b"x.", "cannot be scanned"),
    "no pickle": (b"PK\x03\x04", "cannot be scanned"),
    "nothing": (b"", "cannot be scanned"),
}


@pytest.mark.parametrize("how", NOT_PROVED)
def test_what_cannot_be_followed_is_not_proved(how: str) -> None:
    pickled, why = NOT_PROVED[how]
    with pytest.raises(scan.NotProved, match=why):
        list(scan.names(pickled))


@pytest.mark.parametrize("compress", [0, 3])
def test_files_of_joblib_are_not_proved(tmp_path: Path, compress: int) -> None:
    joblib.dump(
        LogisticRegression(max_iter=2000).fit(FRAME, TARGET), tmp_path / "model.pkl", compress=compress
    )
    verdict = scan._pickle(tmp_path / "model.pkl", scan.MOST_BYTES) if not compress else None
    if verdict is not None:
        assert verdict == scan.Verdict(False, "its pickle names joblib.numpy_pickle.NumpyArrayWrapper")
    else:
        with pytest.raises(scan.NotProved, match="cannot be scanned"):
            list(scan.names((tmp_path / "model.pkl").read_bytes()))


def test_a_long_pickle_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "MOST_OPERATIONS", 100)
    with pytest.raises(scan.NotProved, match="more than 100"):
        list(scan.names(b"N0" * 200 + b"N."))


def test_the_verdict_on_packages(tmp_path: Path) -> None:
    model = LogisticRegression(max_iter=2000).fit(FRAME, TARGET)
    for form in ("pickle", "cloudpickle"):
        loaders.save_model(model, tmp_path / form, serialization_format=form)
        assert scan.package(read(tmp_path / form)).harmless
    assert not scan.package(read(tmp_path / "pickle"), 10).harmless
    loaders.save_model(Custom(max_iter=2000).fit(FRAME, TARGET), tmp_path / "custom")
    verdict = scan.package(read(tmp_path / "custom"))
    assert not verdict.harmless
    assert "names" in verdict.reason
    code = tmp_path / "own_helpers.py"
    code.write_text("X = 1\n")
    loaders.save_model(model, tmp_path / "shipping", code_paths=[code])
    assert scan.package(read(tmp_path / "shipping")) == scan.Verdict(False, "it ships code")
