"""What a prediction costs by protocol: JSON, V2 in JSON, V2 with binary data, gRPC; one row, 1,000 rows of 30
columns, and a tensor of 1 MB.

    python -m tests.bench.bench_protocols [ROUNDS]

A gateway in a process of its own, the model in another. The protocols take turns, round by round, so that
what else the machine does is the same for all. Each figure is the median of the rounds: the time of
a request on one connection, and the CPU time of all processes of the gateway.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

import gateway
from loaders.signature import ColSpec, Scalar, Signature, TensorSpec
from tests.e2e.test_grpc import address
from tests.support import rpc
from tests.support.running import running

COLUMNS = [f"c{number}" for number in range(30)]
TICK = os.sysconf("SC_CLK_TCK")
#: Requests of a round, by case.
REQUESTS = {"one row": 300, "1,000 x 30": 40, "1 MB": 30}


def summing() -> Any:
    """A model whose answer is small and costs little. Its class is local, so that it is pickled by value."""

    class Summing:
        def predict(self, model_input: Any) -> Any:
            import numpy

            return [float(numpy.asarray(model_input).sum())]

    return Summing()


def processes(pid: int) -> list[int]:
    """A process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in processes(int(child)))]


def cpu_seconds(pid: int) -> float:
    ticks = 0
    for one in processes(pid):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICK


def cases(port: int, called: rpc.Caller) -> dict[str, dict[str, Callable[[], None]]]:
    """By case and protocol, what asks once."""
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def over_http(path: str, body: bytes, **headers: str) -> Callable[[], None]:
        sent = {"content-type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}

        def ask() -> None:
            connection.request("POST", path, body, sent)
            answer = connection.getresponse()
            content = answer.read()
            assert answer.status == 200, content

        return ask

    def of(model: str, plain: Mapping[str, Any], array: Any, datatype: str) -> dict[str, Callable[[], None]]:
        about = {"name": "x", "datatype": datatype, "shape": list(array.shape)}
        path = f"/v2/models/{model}/infer"
        text = json.dumps({"inputs": [{**about, "data": array.reshape(-1).tolist()}]}).encode()
        raw = array.tobytes()
        part = {"inputs": [{**about, "parameters": {"binary_data_size": len(raw)}}]}
        head = json.dumps({**part, "parameters": {"binary_data_output": True}}).encode()
        message = rpc.request(model, {"x": (datatype, array)}).SerializeToString()
        return {
            "JSON": over_http(f"/predict/{model}", json.dumps(plain).encode()),
            "V2 JSON": over_http(path, text),
            "V2 binary": over_http(path, head + raw, inference_header_content_length=str(len(head))),
            "gRPC": lambda: called.infer(message) and None,
        }

    random = np.random.default_rng(3)
    found = {}
    for name, rows in (("one row", 1), ("1,000 x 30", 1000)):
        table = random.random((rows, len(COLUMNS)))
        plain = {"dataframe_split": {"columns": COLUMNS, "data": table.tolist()}}
        found[name] = of("table", plain, table, "FP64")
    tensor = random.random((512, 512)).astype(np.float32)
    found["1 MB"] = of("tensor", {"inputs": tensor.tolist()}, tensor, "FP32")
    return found


def main(rounds: int = 9) -> None:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        registry = str(directory / "registry.yaml")
        table = Signature(inputs=tuple(ColSpec(Scalar.double, name) for name in COLUMNS))
        tensor = Signature(inputs=(TensorSpec(np.dtype(np.float32), (-1, 512)),))
        for name, signature in (("table", table), ("tensor", tensor)):
            gateway.log_model(summing(), name, registry, signature=signature, alias="champion", verify=False)
        server = stack.enter_context(running(directory, GATEWAY_GRPC_PORT="0"))
        called = stack.enter_context(rpc.caller(address(server)))
        port = int(server.url.rpartition(":")[2])
        print(f"{'':12} {'protocol':10} {'requests/s':>10} {'ms':>8} {'CPU ms':>8}")
        for case, protocols in cases(port, called).items():
            number = REQUESTS[case]
            figures: dict[str, list[tuple[float, float]]] = {name: [] for name in protocols}
            for _ in range(rounds + 1):
                for name, ask in protocols.items():
                    cpu, began = cpu_seconds(server.process.pid), time.perf_counter()
                    for _ in range(number):
                        ask()
                    spent = time.perf_counter() - began
                    figures[name].append((spent / number, (cpu_seconds(server.process.pid) - cpu) / number))
            for name, measured in figures.items():
                wall, cpu = (float(np.median(column)) for column in zip(*measured[1:], strict=True))
                print(f"{case:12} {name:10} {1 / wall:10.0f} {1e3 * wall:8.2f} {1e3 * cpu:8.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
