"""The gateway next to a server written by hand, MLflow, MLServer, BentoML, LitServe and Ray Serve.

    python -m tests.bench.bench_peers install [--envs DIRECTORY]
    python -m tests.bench.bench_peers one  [--model logistic|forest|mlp] [--connections 1 16 64] [--named]
    python -m tests.bench.bench_peers many [--count 100] [--room 20] [--named]

`one`: one model, one row a request. `many`: different small models in one server: the first answer of a cold
one, the memory of all, one hot model, Zipf(1.0) over all, and the same with room for some.
Both: [--rounds 5] [--seconds 3] [--peers NAME …] [--envs DIRECTORY] [--python PYTHON] [--json FILE]

Each server has an environment of its own, made by the command and kept in --envs. The libraries that compute
are the same in all. A server with all its processes has one core, the load another. Before anything is timed,
distinct rows are sent on several connections at a time, and each answer is compared with what the model
itself says: a server that swaps the rows of a batch, or asks another model, takes no part. In `one` the
servers that are not measured are frozen. The rounds are interleaved. Figures are medians; in brackets the
least and the most. The CPU time is that of all the server's processes, ended ones included; noise moves it
least. Models are fitted on arrays, or with --named on frames: then requests name their columns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from tests.bench.bench_serving import cores
from tests.bench.peers import environments, many, one
from tests.bench.peers.stage import Stage
from tests.bench.peers.table import MANY, ONE

NEEDED = ("plain", "gateway")
"""The environments that make the models and their packages."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["install", "one", "many"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--model", choices=["logistic", "forest", "mlp"], default="logistic")
    parser.add_argument("--named", action="store_true", help="fit on frames; rows have column names")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--room", type=int, default=20)
    parser.add_argument("--peers", nargs="+", choices=sorted({*ONE, *MANY}))
    parser.add_argument("--envs", type=Path, default=environments.default_root())
    # Not that of a virtual environment: whichever asks, the environments stay the same.
    parser.add_argument("--python", default=getattr(sys, "_base_executable", sys.executable))
    parser.add_argument("--json", type=Path, help="also write every round there")
    return parser.parse_args()


def machine() -> str:
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = found[0].partition(":")[2].strip() if found else platform.machine()
    return f"{name}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}"


def say_environments(stage: Stage, names: Iterable[str]) -> None:
    equal = [requirement.partition("==")[0] for requirement in environments.EQUAL]
    print(f"equal in all: {', '.join(environments.EQUAL)}")
    for name in names:
        found = stage.environments[name]
        if found.failure:
            print(f"  {name}: CANNOT BE INSTALLED: {found.failure}")
            continue
        versions = found.versions()
        shown = ("model-gateway", "mlflow", "mlserver", "bentoml", "litserve", "ray", "uvicorn", "starlette")
        parts = [f"{package} {versions[package]}" for package in shown if package in versions]
        missing = [package for package in equal if package not in versions]
        print(f"  {name}: {', '.join(parts)}" + (f"; without {', '.join(missing)}" if missing else ""))


def main() -> None:
    options = arguments()
    table = MANY if options.what == "many" else ONE
    names = [name for name in options.peers or table if name in table]
    if options.model == "mlp" and options.what == "one":
        left_out = [name for name in names if not table[name].mlp]
        names = [name for name in names if table[name].mlp]
        for name in left_out:
            print(f"{table[name].title}: has no runtime for ONNX")
    server_core, load_core = cores()
    scratch = Path(tempfile.mkdtemp(prefix="peers-"))
    stage = Stage(options.envs, options.python, scratch / "models", scratch, server_core)
    used = [*NEEDED, *(table[name].environment for name in names)]
    if options.what == "install":
        used = list(environments.REQUIREMENTS)
    try:
        stage.make(used)
        say_environments(stage, dict.fromkeys(used))
        if options.what == "install":
            return
        began = time.monotonic()
        load = "wrk" if shutil.which("wrk") else "the small client of tests/bench/peers/load.py"
        print(f"{machine()}; {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC")
        print(f"servers on core {server_core}, {load} on core {load_core}", end="")
        print(f"; {options.rounds} rounds of {options.seconds:g} s")
        if options.what == "one":
            print(f"one row a request, {options.model}", flush=True)
            stage.train(options.model, 1, options.named)
            single = one.run(stage, names, options.rounds, options.seconds, options.connections, load_core)
            one.report(single, names, options.connections)
            raw = single.raw()
        else:
            print(f"{options.count} different fits, {many.CONNECTIONS} connections", flush=True)
            stage.train("logistic", options.count, options.named)
            several = many.run(
                stage, names, options.rounds, options.seconds, options.count, options.room, load_core
            )
            many.report(several, names, options.count, options.room)
            raw = several.raw()
        print(f"\ntook {time.monotonic() - began:.0f} s")
        if options.json:
            about = {
                "machine": machine(),
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
                "arguments": sys.argv[1:],
            }
            versions = {name: stage.environments[name].versions() for name in dict.fromkeys(used)}
            options.json.write_text(json.dumps({**about, **raw, "versions": versions}, indent=1))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
