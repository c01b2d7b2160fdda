"""Models in packs, over the zygotes of a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gateway.runners.confinement import Confinement
from gateway.runners.environments import Environment
from gateway.runners.packed import PackedRunner, Record
from gateway.runners.packs import Pack, Packs
from gateway.runners.places import Conditions
from loaders.batch import Tensors
from loaders.package import Package
from loaders.worker import wire
from tests.support.hostile import write_package
from tests.support.processes import Processes

#: Code of a model that waits while it answers 13, and says with a file that it does.
HELD = """
import time
if data[0] == 13:
    open(params["begun"], "w").close()
    while not os.path.exists(params["go"]):
        time.sleep(0.002)
"""


def rows(*values: float) -> Tensors:
    return Tensors({"": np.array(values)}, len(values))


def given(answer: Any) -> list[float]:
    assert isinstance(answer, Tensors)
    return list(answer.arrays[""].tolist())


class PackBench:
    """Model processes, with packs over their zygotes."""

    def __init__(self, made: Processes) -> None:
        self.processes = made
        self.packs = Packs(made.zygotes)
        self.runners: list[PackedRunner] = []
        self.observed: list[tuple[str, str]] = []

    def runner(self, package: Package, *, record: Record | None = None, **options: Any) -> PackedRunner:
        conditions = {
            "group": "g",
            "environment": Environment(),
            "threads": 1,
            "variables": (),
            # The tests meet their models by files.
            "confinement": Confinement(filesystem=False, user="same"),
            "max_answer": wire.MAX_FRAME,
        }
        conditions |= {name: options.pop(name) for name in list(options) if name in conditions}
        made = PackedRunner(
            package, {}, packs=self.packs, conditions=Conditions(**conditions),
            alone=lambda reason: self.processes.runner(package, confinement=conditions["confinement"]),
            record=record or Record(), placement="in a pack",
            observe=lambda what, reason: self.observed.append((what, reason)), **options,
        )  # fmt: skip
        self.runners.append(made)
        return made

    async def started(self, package: Package, **options: Any) -> PackedRunner:
        runner = self.runner(package, **options)
        await runner.start()
        return runner

    @property
    def pack(self) -> Pack:
        (pack,) = self.packs
        return pack


def pid(runner: PackedRunner) -> int:
    (process,) = runner.status()["processes"]
    return int(process["pid"])


def scaled(directory: Path, factor: float) -> Package:
    return write_package(directory, at_predict=f"return data * {factor}")


async def answered_by(runner: PackedRunner, *values: float) -> list[float]:
    return given(await runner.predict(rows(*values), {}))
