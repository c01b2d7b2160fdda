"""What a message costs is told from its bytes: never less than it takes, whatever the bytes are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("google.protobuf", reason="the extra grpc is not installed")

from gateway.grpc import cost
from gateway.grpc import inference_pb2 as pb


@given(st.binary(max_size=400))
def test_any_bytes_have_a_cost(body: bytes) -> None:
    assert cost.memory(body) >= 0


def test_raw_contents_cost_two_copies_and_typed_ones_what_they_become() -> None:
    raw = pb.ModelInferRequest(raw_input_contents=[bytes(1_000_000)])
    assert 2_000_000 <= cost.memory(raw.SerializeToString()) < 2_010_000
    packed = pb.ModelInferRequest()
    packed.inputs.add().contents.int64_contents.extend([1] * 100_000)
    body = packed.SerializeToString()
    assert len(body) < 110_000
    assert cost.memory(body) >= 2 * np.zeros(100_000, np.int64).nbytes


@pytest.mark.parametrize("part", [b"\x2a\x00", b"\x32\x00", b"\x22\x00", b"\x3a\x00"])
def test_many_small_parts_cost_more_than_their_bytes(part: bytes) -> None:
    assert cost.memory(part * 100_000) >= 100_000 * 2 * cost.DENSEST // 2
