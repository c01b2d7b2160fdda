"""Formats where code is refused: the file decides, by the operator's list, never the package's own."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn.linear_model import LogisticRegression

import loaders
from gateway.artifacts import formats
from gateway.artifacts.cache import Artifacts
from gateway.artifacts.formats import Unsafe, judged
from gateway.artifacts.packages import FormatPolicy, Packages
from gateway.errors import Problem
from gateway.registries.base import Version
from loaders import flavors, package
from loaders.package import Package
from tests.conftest import needs
from tests.support.memory import at_most

X = np.array([[0.0], [1.0], [2.0], [3.0]])


def judge(found: Package, *accepted: str) -> Package:
    return judged(found, flavors.find(found), accepted)


def skops_package(directory: Path, schema: Any, trusted: list[str]) -> Package:
    """A package whose skops file says what it holds, and which trusts what it likes."""
    directory.mkdir()
    with zipfile.ZipFile(directory / "model.skops", "w") as archive:
        archive.writestr("schema.json", schema if isinstance(schema, str) else json.dumps(schema))
    entries = {
        "python_function": {"loader_module": "mlflow.sklearn", "model_path": "model.skops"},
        "sklearn": {
            "pickled_model": "model.skops",
            "serialization_format": "skops",
            "skops_trusted_types": trusted,
        },
    }
    (directory / "MLmodel").write_text(yaml.safe_dump({"flavors": entries}))
    return package.read(directory)


def trusts(found: Package) -> Any:
    return found.flavors["sklearn"]["skops_trusted_types"]


HARMLESS = {"__class__": "LogisticRegression", "__module__": "sklearn.linear_model._logistic"}


@pytest.mark.parametrize(
    "inner",
    [
        {"__class__": "system", "__module__": "os"},
        {
            "__class__": "function",
            "__module__": "builtins",
            "content": {"module_path": "os", "function": "system"},
        },
        [{"deep": [{"__class__": "system", "__module__": "os"}]}],
    ],
)
def test_what_a_skops_file_holds_counts_and_not_what_it_trusts(tmp_path: Path, inner: Any) -> None:
    found = skops_package(tmp_path / "p", {**HARMLESS, "content": inner}, ["os.system"])
    with pytest.raises(Unsafe, match=r"sklearn, skops.*untrusted types: os\.system;.*skops:os\.system"):
        judge(found)
    with pytest.raises(Unsafe):
        judge(found, "pt2", "skops:xgboost.*")
    assert trusts(judge(found, "skops:os.*")) == ["os.system"]
    assert trusts(judge(skops_package(tmp_path / "q", HARMLESS, ["os.system"]))) == []


@pytest.mark.parametrize("schema", ["", "{", "[" * 100_000])
def test_a_skops_file_that_is_none_is_an_error(tmp_path: Path, schema: str) -> None:
    with pytest.raises(package.PackageError, match=r"schema\.json"):
        judge(skops_package(tmp_path / "p", schema, []))
    (tmp_path / "p" / "model.skops").write_bytes(b"no archive")
    with pytest.raises(package.PackageError, match="is not a skops file"):
        judge(package.read(tmp_path / "p"))


def test_a_refusal_names_the_format_and_is_not_for_trying_again(tmp_path: Path) -> None:
    loaders.save_model(LogisticRegression().fit(X, [0, 0, 1, 1]), tmp_path / "m", verify=False)

    with ThreadPoolExecutor(1) as pool:
        artifacts = Artifacts(tmp_path / "cache", 2**30)
        packages = Packages(artifacts, pool, pool, policy=lambda name, digest: FormatPolicy("refuse"))
        with pytest.raises(Problem, match=r"sklearn, cloudpickle.*executes code") as raised:
            asyncio.run(packages.get(Version("m", "1", str(tmp_path / "m"))))
    assert not raised.value.retryable
    assert not raised.value.again().retryable


@pytest.mark.all
def test_a_real_skops_file_loads_where_code_is_refused(tmp_path: Path) -> None:
    needs("skops")
    model = LogisticRegression().fit(X, [0, 0, 1, 1])
    saved = loaders.save_model(model, tmp_path / "m", serialization_format="skops", verify=False)
    accepted = judge(saved)
    assert trusts(accepted) == []
    assert loaders.open_model(accepted, {}).predict(X).tolist() == [0, 0, 1, 1]


# ---- exported programs


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("torch")
    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)

        def forward(self, x: Any) -> Any:
            return self.layer(x) * torch.tensor([1.0, 2.0])

    rows = torch.export.Dim("rows", min=1, max=1000)
    program = torch.export.export(Net(), (torch.zeros(4, 3),), dynamic_shapes=({0: rows},))
    path = tmp_path_factory.mktemp("exported") / "m"
    loaders.save_model(program, path, verify=False)
    return path


def changed(source: Path, target: Path, change: Any) -> Package:
    """A copy whose members went through `change(name, content)`; what it yields is written."""
    import shutil

    shutil.copytree(source, target)
    file = target / "data" / "model.pt2"
    with zipfile.ZipFile(file) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members:
            for new_name, new_content in change(name, content):
                archive.writestr(new_name, new_content)
    return package.read(target)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def replaced(part: str, old: bytes, new: bytes) -> Any:
    def change(name: str, content: bytes) -> Any:
        if part in name:
            assert old in content
            content = content.replace(old, new)
        return [(name, content)]

    return change


def with_member(inner: str) -> Any:
    def change(name: str, content: bytes) -> Any:
        yield name, content
        if name.endswith("archive_version"):
            yield f"{name.partition('/')[0]}/{inner}", b"x"

    return change


def evil_inputs(name: str, content: bytes) -> Any:
    if "sample_inputs" in name:
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            archive.writestr("model/data.pkl", pickle.dumps(Evil(), protocol=2))
        content = made.getvalue()
    return [(name, content)]


def bare_pickle(name: str, content: bytes) -> Any:
    return [(name, pickle.dumps(Evil(), protocol=2) if "sample_inputs" in name else content)]


@pytest.mark.all
def test_an_exported_program_loads_where_the_operator_accepts_the_format(exported: Path) -> None:
    found = package.read(exported)
    with pytest.raises(Unsafe, match=r"pytorch, pt2.*accepted_formats contains pt2"):
        judge(found)
    assert judge(found, "pt2") is found
    rows = np.ones((2, 3), np.float32)
    assert loaders.open_model(found, {}).predict(rows).shape == (2, 2)


@pytest.mark.all
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("weights_config", b'"use_pickle": false', b'"use_pickle": true'), "holds a pickle"),
        (replaced("constants_config", b'"use_pickle": false', b'"use_pickle": true'), "holds a pickle"),
        (with_member("data/aotinductor/m/x.so"), "executes code or is unknown"),
        (with_member("data/constants/custom_obj_0"), "executes code or is unknown"),
        (with_member("data/weights/weight_0"), "executes code or is unknown"),
        (with_member("extra/code.py"), "executes code or is unknown"),
        (replaced("models/", b"Symbol('s77'", b"__import__('os'"), "expression"),
        (replaced("models/", b"Symbol('s77'", b"exec('s77'"), "expression"),
        (replaced("models/", b"torch.ops.aten.mul.Tensor", b"torch.os.system"), "not an operator of torch"),
        (evil_inputs, "not only tensors"),
        (bare_pickle, "not only tensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_program_that_brings_code_is_refused(
    exported: Path, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(Unsafe, match=message):
        judge(changed(exported, tmp_path / "m", change), "pt2")


def archive(members: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as written:
        for name, content in members.items():
            written.writestr(name, content)
    return made.getvalue()


INPUTS = "m/data/sample_inputs/model.pt"
HUGE = b"\x80\x04" + b"N0" * (16 << 20) + b"N."


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({INPUTS: archive({"a/data.pkl": HUGE})}, "not only tensors"),
        ({INPUTS: archive({"a/data.pkl": HUGE, "a/code.py": b""})}, "not only tensors"),
        ({INPUTS: archive({"a/data.pkl": b"N.", "b/data.pkl": b"N."})}, "not only tensors"),
        ({INPUTS: b"PK\x03\x04" + b"\xff" * 100}, "not only tensors"),
        (
            {f"m/data/sample_inputs/{number}.pt": b"\0" * (30 << 20) for number in range(5)},
            "more than can be checked",
        ),
        (
            {f"m/models/{number}.json": b"[]" + b" " * (14 << 20) for number in range(10)},
            "more than can be checked",
        ),
    ],
    ids=["a huge pickle", "and code", "two pickles", "no archive", "many inputs", "many programs"],
)
def test_a_program_that_unpacks_to_too_much_is_refused_unread(
    members: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "model.pt2"
    file.write_bytes(archive(members))
    with at_most(8), pytest.raises(Unsafe, match=message):
        formats._judge_pt2(file, ["pt2"])


def test_a_program_of_many_members_is_judged_in_linear_time(tmp_path: Path) -> None:
    """Comparing each name with each took minutes."""
    file = tmp_path / "model.pt2"
    file.write_bytes(archive({f"m/data/weights/weight_{number}": b"" for number in range(20_000)}))
    formats._judge_pt2(file, ["pt2"])
    file.write_bytes(archive({f"m/data/weights/weight_{number}": b"" for number in range(60_000)}))
    with pytest.raises(package.PackageError, match="not a pt2 file"):
        formats._judge_pt2(file, ["pt2"])


@pytest.mark.all
def test_a_whole_module_next_to_a_program_is_a_pickle(exported: Path, tmp_path: Path) -> None:
    found = changed(exported, tmp_path / "m", lambda name, content: [(name, content)])
    assert judge(found, "pt2") is found
    (tmp_path / "m" / "data" / "model.pth").write_bytes(b"")
    with pytest.raises(Unsafe, match="pytorch, pickle"):
        judge(found, "pt2")
