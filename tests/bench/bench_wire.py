"""How a batch gets to a model process and back: frames over a socket pair, compared with shared memory.

    python -m tests.bench.bench_wire [ROUNDS]

A forked child answers each array with the same array (an echo, so both directions count). The shared
memory path is the fairest one: a block made once and used again, one copy in and one copy out at each
end, and a byte over the socket to say that it is there. Rounds of both are interleaved.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing import shared_memory

import numpy as np

from loaders.worker import wire

SIZES = {"4 KB": 4 << 10, "4 MB": 4 << 20, "64 MB": 64 << 20}


def echo_frames(sock: socket.socket) -> None:
    reader = wire.Reader()
    while (message := wire.receive(sock, reader)) is not None:
        wire.transmit(sock, wire.encode(message))


def echo_shared(sock: socket.socket, name: str, size: int) -> None:
    block = shared_memory.SharedMemory(name)
    view = np.ndarray(size, np.uint8, buffer=block.buf)
    while sock.recv(1):
        array = view.copy()
        view[:] = array
        sock.send(b"x")


def forked(work: Callable[[socket.socket], None]) -> socket.socket:
    near, far = socket.socketpair()
    if os.fork() == 0:
        near.close()
        work(far)
        os._exit(0)
    far.close()
    return near


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    for label, size in SIZES.items():
        array = np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)
        block = shared_memory.SharedMemory(create=True, size=size)
        view = np.ndarray(size, np.uint8, buffer=block.buf)
        framed, shared = forked(echo_frames), forked(lambda sock: echo_shared(sock, block.name, size))  # noqa: B023
        reader = wire.Reader()
        times: dict[str, list[float]] = {"frames": [], "shared memory": []}
        for i in range(rounds * (20 if size < 1 << 20 else 1) + 2):
            start = time.perf_counter()
            wire.transmit(framed, wire.encode({"op": "echo", "array": array}))
            answer = wire.receive(framed, reader)
            middle = time.perf_counter()
            view[:] = array
            shared.send(b"x")
            shared.recv(1)
            copy = view.copy()
            end = time.perf_counter()
            assert answer is not None
            assert answer["array"][-1] == copy[-1] == array[-1]
            if i >= 2:  # the first two touch fresh pages
                times["frames"].append(middle - start)
                times["shared memory"].append(end - middle)
        for name, taken in times.items():
            ordered = sorted(taken)
            p99 = ordered[int(len(ordered) * 0.99) - 1]
            print(
                f"{label:>6} {name:14} p50 {statistics.median(taken) * 1e3:8.3f} ms  p99 {p99 * 1e3:8.3f} ms"
            )
        framed.close()
        shared.close()
        del view
        block.close()
        block.unlink()


if __name__ == "__main__":
    main()
