"""Warm-up: a model answers its own example before it serves, in a pack once for its files."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from sklearn.linear_model import LinearRegression

import loaders
from gateway.artifacts.packages import NOT_SCANNED
from gateway.runners.base import ModelError, RunnerCrashed
from gateway.serving import warmup
from gateway.serving.warmup import WarmUps
from loaders import enforcement
from loaders.batch import Batch, Columns, Tensors, Value
from loaders.enforcement import Rules
from loaders.scan import Verdict
from loaders.schema import ColSpec, Scalar
from loaders.signature import Signature


@pytest.mark.parametrize("has_example", [True, False])
def test_the_example_is_read_and_enforced_off_the_event_loop(
    has_example: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = pd.DataFrame({"x": [1.0, 2.0]})
    package = loaders.save_model(
        LinearRegression().fit(frame, frame["x"]),
        tmp_path / "m",
        signature=Signature((ColSpec(Scalar.double, "x"),)),
        input_example=frame if has_example else None,
        verify=False,
    )
    threads: list[threading.Thread] = []
    enforced: list[Any] = []

    def enforce(*given: Any, **named: Any) -> Any:
        threads.append(threading.current_thread())
        return enforcement.enforce(*given, **named)

    async def prewarm(batch: Any, params: Any) -> Any:
        enforced.append(batch)
        return Value([1.0], 1)

    monkeypatch.setattr(warmup, "enforce", enforce)
    prepared: Any = SimpleNamespace(
        package=package, signature=package.signature, accepted=None, warnings=(),
        check_answer=lambda answer: [], check_output=lambda answer: [],
        needs=SimpleNamespace(facts=SimpleNamespace(custom=False)), runtime=None, digest="d",
        verdict=NOT_SCANNED,
    )  # fmt: skip
    runner: Any = SimpleNamespace(merges=False, known={}, prewarm=prewarm, alike=None)
    rules: Rules = (package.signature, "strict", False, False)
    warmed = asyncio.run(WarmUps().run(runner, prepared, rules))
    assert (warmed.merges, warmed.warnings) == (False, ())
    assert len(enforced) == 1
    assert threading.main_thread() not in threads

    if has_example:
        monkeypatch.setattr(warmup, "MOST_SERVED", 10)
        [warning] = asyncio.run(WarmUps().run(runner, prepared, rules)).warnings
        assert "cannot be read" in warning
        assert "larger than" in warning


SIGNATURE = Signature((ColSpec(Scalar.double, "x"),))
STRICT: Rules = (SIGNATURE, "strict", False, False)


class Doubles:
    """A runner that doubles x. `fails`: by the number of rows, what its call raises. `asked`: rows of each
    call. `most`: how many calls were in progress at the same time. `moves`: what is alike after its first
    call."""

    merges = True

    def __init__(
        self,
        alike: str | None = "its pack",
        fails: dict[int, Exception] | None = None,
        moves: str | None = "its pack",
    ) -> None:
        self.alike = alike
        self.moves = moves
        self.known: dict[str, Any] = {}
        self.fails = fails or {}
        self.asked: list[int | None] = []
        self.running = self.most = 0

    async def prewarm(self, batch: Batch, params: Any) -> Batch:
        assert isinstance(batch, Columns)
        self.asked.append(batch.rows)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        self.alike = self.moves if self.alike else None
        if (error := self.fails.get(batch.rows)) is not None:
            raise error
        return Tensors({"": batch.arrays["x"] * 2.0}, batch.rows)


def described(digest: str = "d", *, harmless: bool = True, warnings: tuple[str, ...] = ("old",)) -> Any:
    package = SimpleNamespace(
        bare=None, example_input=lambda most: (enforcement.RawInput("inputs", {"x": [1.0, 2.0, 3.0]}), None)
    )
    return SimpleNamespace(
        package=package, signature=SIGNATURE, accepted=None, warnings=warnings, digest=digest, needs=None,
        runtime=None, verdict=Verdict(harmless, ""),
        check_answer=lambda answer: [], check_output=lambda answer: ["out"],
    )  # fmt: skip


@pytest.mark.anyio
async def test_a_pack_repeats_no_warm_up_of_the_same_files() -> None:
    warm_ups = WarmUps()
    first = await warm_ups.run(Doubles(), described(), STRICT)
    assert (first.merges, first.warnings, first.misfits) == (True, ("old", "out"), ("out",))
    again = Doubles()
    assert await warm_ups.run(again, described(), STRICT) == first
    assert again.asked == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("runner", "prepared", "rules"),
    [
        pytest.param(Doubles(), described("other"), STRICT, id="other files"),
        pytest.param(
            Doubles(), described(warnings=("new",)), STRICT, id="another warning of its environment"
        ),
        pytest.param(Doubles(), described(), (SIGNATURE, "strict", False, True), id="rows by position"),
        pytest.param(Doubles("other config"), described(), STRICT, id="another config"),
        pytest.param(Doubles(None), described(), STRICT, id="its own process"),
    ],
)
async def test_what_may_change_the_answer_is_warmed_up_again(
    runner: Doubles, prepared: Any, rules: Rules
) -> None:
    warm_ups = WarmUps()
    await warm_ups.run(Doubles(), described(), STRICT)
    warmed = await warm_ups.run(runner, prepared, rules)
    assert runner.asked
    assert warmed.warnings == (*prepared.warnings, "out")


@pytest.mark.anyio
async def test_a_model_that_may_execute_anything_is_warmed_up_each_time() -> None:
    """The operator may put a model with code of its own into a pack."""
    warm_ups = WarmUps()
    for _ in range(2):
        runner = Doubles()
        await warm_ups.run(runner, described(harmless=False), STRICT)
        assert runner.asked


@pytest.mark.anyio
async def test_a_warm_up_of_a_model_that_moved_meanwhile_is_not_kept() -> None:
    warm_ups = WarmUps()
    await warm_ups.run(Doubles(moves=None), described(), STRICT)
    runner = Doubles()
    await warm_ups.run(runner, described(), STRICT)
    assert runner.asked


@pytest.mark.anyio
async def test_a_failed_warm_up_is_repeated() -> None:
    warm_ups = WarmUps()
    with pytest.raises(ModelError):
        await warm_ups.run(Doubles(fails={3: ModelError("no")}), described(), STRICT)
    assert (await warm_ups.run(Doubles(), described(), STRICT)).merges


@pytest.mark.anyio
async def test_whether_rows_may_be_merged_is_asked_in_one_go() -> None:
    runner = Doubles()
    await WarmUps().run(runner, described(), STRICT)
    assert runner.asked == [3, 1, 2, 8]
    assert runner.most == 3


@pytest.mark.anyio
@pytest.mark.parametrize("rows", [1, 2, 8])
async def test_a_model_that_raises_for_some_numbers_of_rows_is_not_merged(rows: int) -> None:
    runner = Doubles(fails={rows: ModelError("no")})
    if rows == 1:
        with pytest.raises(ModelError):
            await WarmUps().run(runner, described(), STRICT)
    else:
        warmed = await WarmUps().run(runner, described(), STRICT)
        assert not warmed.merges
        assert "one by one" in warmed.warnings[-1]
    assert runner.running == 0


@pytest.mark.anyio
async def test_a_process_that_ends_during_the_check_ends_the_load() -> None:
    runner = Doubles(fails={1: RunnerCrashed("it ended"), 2: RunnerCrashed("it ended"), 8: ModelError("no")})
    with pytest.raises(RunnerCrashed):
        await WarmUps().run(runner, described(), STRICT)
    assert runner.running == 0
