"""A process that hosts models, for tests that kill it: `python -m tests.support.hosting SCRATCH START DIR…`.

Says `ready` once every package is loaded, and then asks each one without end.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from gateway.runners.environments import Environment
from gateway.runners.process import ProcessRunner
from gateway.runners.zygote import Zygotes
from loaders.package import read
from tests.support.processes import ONE


async def main(scratch: str, start: str, *packages: str) -> None:
    zygotes = Zygotes(scratch=Path(scratch))
    environment = Environment(start="fork" if start == "fork" else "spawn")
    runners = [
        ProcessRunner(
            read(path),
            {},
            zygotes=zygotes,
            name="m",
            version="1",
            environment=environment,
            sink=lambda line: None,
        )
        for path in packages
    ]
    await asyncio.gather(*(runner.start() for runner in runners))
    calls = [asyncio.ensure_future(runner.predict(ONE, {})) for runner in runners]
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.gather(*calls)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
