"""Files that claim or unpack to more than the gateway may spend on them; its own process reads them."""

from __future__ import annotations

import ast
import bz2
import gzip
import io
import lzma
import pickle
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.environments import facts, pickles
from loaders import environment, opcodes, scan
from tests.support.memory import at_most
from tests.support.packages import described

LONG = 32 << 20
ZEROS = bytes(1 << 20)


def long_argument(handle: Any, size: int = LONG) -> None:
    handle.write(b"\x80\x04\x8e" + struct.pack("<Q", size))
    for _ in range(size >> 20):
        handle.write(ZEROS)
    handle.write(b"0cacme.after\nName\n.")


@contextmanager
def writing(file: Path) -> Iterator[Any]:
    if file.suffix == ".pt":
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("a/data.pkl", "w") as one,
        ):
            yield one
        return
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    with openers.get(file.suffix, open)(file, "wb") as handle:
        yield handle


@pytest.mark.parametrize("name", ["a.pkl", "a.pkl.gz", "a.pkl.xz", "a.pkl.bz2", "a.pt"])
def test_a_long_argument_is_skipped_wherever_it_is(name: str, tmp_path: Path) -> None:
    with writing(tmp_path / name) as handle:
        long_argument(handle)
    with at_most(12):
        found = pickles.read(tmp_path / name)
    assert found.globals == {("acme.after", "Name")}
    assert found.whole


def test_the_scan_for_packs_skips_it_too(tmp_path: Path) -> None:
    with (tmp_path / "a.pkl").open("wb") as handle:
        long_argument(handle)
    with at_most(2), (tmp_path / "a.pkl").open("rb") as handle:
        assert [str(name) for name in scan.names(handle)] == ["acme.after.Name"]


@pytest.mark.parametrize("name", ["a.pkl.gz", "a.pt"])
def test_what_unpacks_to_too_much_is_not_read_to_its_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with writing(tmp_path / name) as handle:
        long_argument(handle, 8 << 20)
    budget = pickles.Budget(unpacked=9 << 20)
    assert pickles.read(tmp_path / name, budget).whole
    again = pickles.read(tmp_path / name, budget)
    assert not again.whole
    assert again.byte_code, "it is taken for the worse"
    monkeypatch.setattr(scan, "MOST_BYTES", 1 << 20)
    assert not pickles.read(tmp_path / name).whole


@pytest.mark.parametrize(
    "budget", [pickles.Budget(operations=50), pickles.Budget(names=50)], ids=["operations", "names"]
)
def test_the_pickles_of_a_package_share_one_budget(budget: pickles.Budget, tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([f"text {number}" for number in range(40)]))
    whole = [pickles.read(tmp_path / "a.pkl", budget).whole for _ in range(3)]
    assert not all(whole)
    assert not whole[-1] or budget.names < 50


@pytest.mark.parametrize(
    "line", [b"S'%s'\n", b"V%s\n", b"L%s\n", b"cacme\n%s\n", b"p%s\n", b"X\xff\xff\xff\xff%s"]
)
def test_a_long_line_is_skipped_or_ends_the_scan(line: bytes) -> None:
    pickled = line.replace(b"%s", b"1" * LONG) + b"."
    with at_most(12):
        try:
            found = list(opcodes.operations(io.BytesIO(pickled)))
        except opcodes.DAMAGED:
            return
    assert [argument for _, argument in found] == [None, None]


def many_members() -> bytes:
    """An archive whose list of members is long, and which is small for that."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
    data = made.getvalue()
    start = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x05\x06")
    listed = data[start:end] * (3_000_000 // (end - start))
    return data[:start] + listed + data[end : end + 12] + struct.pack("<II", len(listed), start) + b"\0\0"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(many_members(), id="a long list of members"),
        b"PK\x05\x06" + b"\xff" * 18,
        b"\x1f\x8b" + b"\xff" * 40,
        b"\xfd7zXZ\0" + b"\xff" * 40,
        b"BZh9" + b"\xff" * 40,
        b"",
        b"\x80",
        b"\x8e\xff",
        b"0" * 100,
    ],
)
@pytest.mark.parametrize("suffix", [".pkl", ".pkl.gz", ".pkl.xz", ".pkl.bz2"])
def test_a_file_that_is_not_what_it_claims_is_an_answer(content: bytes, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    with at_most(20):
        assert not pickles.read(file).whole


def with_code(directory: Path, **sources: str) -> Any:
    files: dict[str, bytes | str] = {f"code/{name}.py": text for name, text in sources.items()}
    return described(directory, loader="mlflow.pyfunc.model", function={"code": "code"}, files=files)


def test_large_sources_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    parse = ast.parse
    monkeypatch.setattr(ast, "parse", lambda source: parsed.append(len(source)) or parse(source))
    one = f"from mlflow.pyfunc import PythonModel\n# {'x' * 60_000}\n"
    package = with_code(tmp_path / "a", **{f"m{number}": one for number in range(40)})
    found = facts.read(package)
    assert sum(parsed) <= 1 << 20
    assert found.mlflow is not None, "an import of mlflow that is not parsed is taken for the worse"

    parsed.clear()
    huge = facts.read(with_code(tmp_path / "b", m="import acme\n" + "a.b\n" * 200_000 + "import mlflow\n"))
    assert parsed == []
    assert {"acme", "mlflow"} <= huge.modules
    assert huge.mlflow is not None

    facts.read(with_code(tmp_path / "c", m="a.b\n" * 1_000))
    assert parsed == [], "a source that does not name mlflow needs no syntax tree"


def test_sources_are_read_one_at_a_time(tmp_path: Path) -> None:
    package = with_code(tmp_path, **{f"m{number}": "#" * (3 << 20) for number in range(40)})
    with at_most(10):
        facts.read(package)
        environment.check(package)


@pytest.mark.parametrize("source", ["\n" * 100_000, " " * 100_000, "\n \n" * 40_000, "a" + ".b" * 20_000])
def test_no_source_takes_quadratic_time(source: str, tmp_path: Path) -> None:
    """Each of these took minutes. The test would not end."""
    package = with_code(tmp_path, m=f"import mlflow\n{source}")
    facts.read(package)
    environment.check(package)
