"""What a call costs in a model's process, without the model, counted in function calls: a time depends on the
machine."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from loaders.batch import Batch, Columns, Tensors
from loaders.model import Model
from loaders.worker import wire
from loaders.worker.process import RequestLoop
from tests.support.counted import counted

#: A call of one row takes 45 calls of functions in Python and in C, the test's included. Raise this only with
#: a reason.
MOST = 47
CALLS = 200


class Constant:
    answer = Tensors({"": np.ones(1)}, 1)

    def run(self, batch: Batch, params: Any) -> Batch:
        return self.answer


@pytest.mark.parametrize(
    "batch", [Columns({"a": np.ones(1), "b": np.ones(1)}, 1), Tensors({"": np.ones((1, 2))}, 1)]
)
def test_a_call_of_one_row_takes_few_calls_of_functions(tmp_path: Path, batch: Batch) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        loop = RequestLoop(theirs, str(tmp_path))
        loop._models[0] = cast(Model, Constant())
        frame = wire.encode_call("predict", batch)
        assert frame is not None
        reader = wire.Reader()

        def call() -> None:
            ours.sendall(frame)
            message = wire.receive(theirs, loop._reader)
            assert message is not None
            wire.transmit(theirs, loop._encoded(message))

        for _ in range(CALLS):
            call()
            wire.receive(ours, reader)
        with counted() as calls:
            for _ in range(CALLS):
                call()
    assert calls.total() / CALLS <= MOST
