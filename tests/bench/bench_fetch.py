"""A package of 1 GB from a real object store: seconds and peak memory, compared with one plain stream.

    python -m tests.bench.bench_fetch [--megabytes 1000] [--rounds 5] [--each-connection MB_PER_S]

`stream` is one GET by s3fs, written to a file and nothing else. `fetch` is what the gateway does: list, fetch
in ranges, check the digest, publish. Each runs in a process of its own, in turns; memory is the greatest
resident size above that before it began. `--each-connection` lets the answers of each connection come through
a proxy at that speed, as stores that are far away do; without it they come as fast as loopback can.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tests.support.object_store import BUCKET, running_store
from tests.support.tcp_proxy import proxy

WAYS = ("stream", "fetch")
SOURCE = f"s3://{BUCKET}/large"


def stream(directory: Path) -> None:
    import s3fs

    files = s3fs.S3FileSystem()
    for name in files.find(SOURCE):
        files.get_file(name, str(directory / name.rpartition("/")[2]), max_concurrency=1)


def fetch(directory: Path, digest: str) -> None:
    from gateway.artifacts.cache import Artifacts
    from gateway.registries.base import Version

    Artifacts(directory / "cache", 10**11).fetch(Version("large", "1", SOURCE, digest))


def resident_peak() -> float:
    """Returns the peak of this process in MB, since the last reset."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1000


def measured(way: str, digest: str, megabytes: int) -> None:
    """In a process of its own: prints what it took."""
    import s3fs

    import gateway.artifacts.cache  # noqa: F401 - what is imported is not what a fetch takes

    list(s3fs.S3FileSystem().find(f"s3://{BUCKET}/small"))
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        resident = resident_peak()
        before = resource.getrusage(resource.RUSAGE_SELF)
        began = time.perf_counter()
        if way == "stream":
            stream(Path(scratch))
        else:
            fetch(Path(scratch), digest)
        seconds = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_SELF)
        peak = resident_peak() - resident
        size = sum(file.stat().st_size for file in Path(scratch).rglob("*") if file.is_file())
        assert size >= megabytes * 1_000_000
        subprocess.run(["chmod", "-R", "u+w", scratch], check=True)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"seconds": seconds, "processor": processor, "peak": peak}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--each-connection", type=float, metavar="MB_PER_S")
    parser.add_argument("--measured", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measured:
        measured(*given.measured, given.megabytes)
        return 0
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (scratch / "store").mkdir()
        store = stack.enter_context(running_store(scratch / "store", volumes=20 + given.megabytes // 25))
        digest = fill(store.files(), scratch / "package", given.megabytes)
        port = store.port
        if given.each_connection:
            between = stack.enter_context(proxy(store.port))
            between.bytes_per_second = given.each_connection * 1e6
            port = between.port
        environ = {**os.environ, **store.environ(port), "TMPDIR": str(scratch)}
        results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for turn in range(given.rounds):
            for way in WAYS if turn % 2 == 0 else WAYS[::-1]:
                command = [sys.executable, "-m", "tests.bench.bench_fetch", "--measured", way, digest]
                command += ["--megabytes", str(given.megabytes)]
                done = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
                results[way].append(json.loads(done.stdout))
                print(f"  {turn + 1} {way}: {done.stdout.strip()}", flush=True)
    for way, rounds in results.items():
        seconds, processor, peak = (
            [each[key] for each in rounds] for key in ("seconds", "processor", "peak")
        )
        middle = statistics.median(seconds)
        print(
            f"{way}: median {middle:.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), "
            f"{given.megabytes / middle:.0f} MB/s, processor {statistics.median(processor):.1f} s, "
            f"peak {max(peak):.0f} MB above the start"
        )
    return 0


def fill(files: object, package: Path, megabytes: int) -> str:
    from loaders.package import digest

    package.mkdir()
    (package / "MLmodel").write_text("flavors: {python_function: {loader_module: mine}}\n")
    block = os.urandom(1_000_000)
    with (package / "weights").open("wb") as file:
        for number in range(megabytes):
            file.write(number.to_bytes(8, "big") + block[8:])
    files.put(str(package), f"{BUCKET}/large", recursive=True)  # type: ignore[attr-defined]
    found = digest(package)
    for file in package.iterdir():
        file.unlink()
    return found


if __name__ == "__main__":
    raise SystemExit(main())
