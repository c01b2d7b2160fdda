"""The instructions of a pickle are read as the standard library reads them."""

from __future__ import annotations

import datetime
import decimal
import io
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders import opcodes

VALUES: tuple[Any, ...] = (
    [None, True, False, 0, 255, 256, 65535, 65536, -1, 2**31 - 1, -(2**31), 2**40, -(2**80), 2**3000],
    [0.5, -1e300, float("inf"), 1 + 2j, decimal.Decimal("1.5"), datetime.date(2020, 1, 2)],
    ["", "a", "ä" * 300, "\ud800", "line\nend", "\\u0041", "x" * 70],
    [b"", b"\x00\xff", b"y" * 300, bytearray(b"z" * 10)],
    OrderedDict(a=(1, 2, 3, 4), b={1, 2}, c=frozenset({3}), d=[[], {}, ()]),
    {str(number): [number] * 3 for number in range(300)},
    np.arange(12, dtype=np.float64).reshape(3, 4),
)


def pickles() -> list[bytes]:
    return [pickle.dumps(value, protocol) for value in VALUES for protocol in range(6)]


@pytest.mark.parametrize("pickled", pickles())
def test_each_instruction_has_its_argument(pickled: bytes) -> None:
    expected = [(code.name, argument) for code, argument, _ in pickletools.genops(pickled)]
    assert list(opcodes.operations(io.BytesIO(pickled))) == expected


@pytest.mark.parametrize("pickled", pickles()[:24])
def test_each_cut_is_found(pickled: bytes) -> None:
    for end in range(len(pickled)):
        with pytest.raises(opcodes.DAMAGED):
            list(opcodes.operations(io.BytesIO(pickled[:end])))


@pytest.mark.parametrize("size", [0, 10, opcodes._SMALL, opcodes._SMALL + 1])
def test_a_file_is_opened_whole_from_its_beginning(size: int, tmp_path: Path) -> None:
    content = bytes(range(256)) * (size // 256) + b"end"[: size % 256]
    (tmp_path / "file").write_bytes(content)
    with opcodes.opened(tmp_path / "file") as handle:
        assert handle.read(1) == content[:1]
        handle.seek(0)
        assert handle.read() == content
