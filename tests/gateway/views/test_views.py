"""The read model: frozen, typed, and the same facts wherever they are shown."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from gateway.errors import Problem
from gateway.names import Reference
from gateway.rollout_settings import RolloutPolicy
from gateway.serving.servable import Phase
from gateway.views import View, shapes
from gateway.views.progress import before_rollout
from tests.support.composed import CHAMPION, Composed, composed
from tests.support.processes import until

pytestmark = pytest.mark.anyio


def test_what_a_view_does_not_have_is_left_out_and_none_is_null() -> None:
    @dataclasses.dataclass(frozen=True, slots=True)
    class Inner(View):
        from_: int
        gone: int | shapes.Absent = shapes.ABSENT

    @dataclasses.dataclass(frozen=True, slots=True)
    class Outer(View):
        parts: tuple[Inner, ...]
        named: dict[str, Inner]
        nothing: str | None = None

    view = Outer((Inner(1),), {"a": Inner(2, 3)})
    assert view.to_json() == {
        "parts": [{"from": 1}],
        "named": {"a": {"from": 2, "gone": 3}},
        "nothing": None,
    }


def test_every_view_is_frozen() -> None:
    kinds = [kind for kind in vars(shapes).values() if isinstance(kind, type) and issubclass(kind, View)]
    assert len(kinds) > 5
    for kind in kinds:
        assert kind.__dataclass_params__.frozen, kind  # type: ignore[attr-defined]


async def test_models_with_the_state_of_each_version(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        await parts.answers()
        parts.of(2).fails = "ValueError: bad weights"
        with pytest.raises(Problem):
            await parts.ask(Reference("iris", version="2"))
        listed = await parts.views.names()
        ((model,),) = [part async for part in parts.views.models(listed)]
        states = {version.version: (version.state, version.reason) for version in model.versions}
        assert states["1"] == ("READY", None)
        assert states["2"][0] == "FAILED"
        assert "bad weights" in (states["2"][1] or "")
        assert states["3"] == ("UNLOADED", None)
        assert model.aliases == {"champion": "1"}
        json.dumps(model.to_json())


async def test_one_model_and_one_version_say_more(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        await parts.answers()
        model = await parts.views.model("iris")
        assert model.writable is True
        assert model.to_json()["rollouts"]["champion"] == parts.views.rollout("iris", "champion").to_json()
        version = (await parts.views.version("iris", "1")).to_json()
        assert (version["name"], version["aliases"], version["flavor"]) == (
            "iris",
            ["champion"],
            ["python_function"],
        )
        assert "runner" not in version
        assert "input_example" not in version
        full = (await parts.views.version("iris", "1", in_full=True)).to_json()
        assert full.keys() - version.keys() == {"runner", "input_example", "example_answer"}


async def test_a_load_under_way_is_shown(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        hold = parts.of(1).hold = asyncio.Event()
        lease = parts.bench.manager.lease(parts.version(1))
        await until(lambda: parts.of(1).starts == 1)
        parts.bench.clock.now += 3
        view = parts.views.state(parts.version(1), lease.servable)
        assert (view.state, view.reason) == ("LOADING", "loading 3.0 s")
        assert view.load == {"phase": "loading", "seconds": 3.0, "expected_seconds": None}
        hold.set()
        await parts.bench.manager.ready(lease)
        assert parts.views.state(parts.version(1), lease.servable).load is shapes.ABSENT
        lease.release()


async def test_an_alias_says_how_far_its_new_version_is(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        hold = parts.of(1).hold = asyncio.Event()
        asked = asyncio.ensure_future(parts.ask())
        await until(lambda: parts.of(1).starts == 1)
        assert parts.views.rollout("iris", "champion").phase == "loading"
        hold.set()
        await asked
        assert parts.views.rollout("iris", "champion").phase == "serving"


def test_each_phase_before_a_rollout_has_its_name() -> None:
    servable = SimpleNamespace(phase=Phase.FETCHING)
    shown = []
    for phase in (Phase.FETCHING, Phase.BUILDING, Phase.QUEUED, Phase.LOADING, Phase.WARMING, Phase.SERVING):
        servable.phase = phase
        shown.append(before_rollout(servable, fetched=False))  # type: ignore[arg-type]
    assert shown == ["fetching", "building", "loading", "loading", "warming", "checking"]
    assert (before_rollout(None, fetched=True), before_rollout(None, fetched=False)) == (
        "fetching", "resolving",
    )  # fmt: skip


async def test_a_rollout_shows_desired_and_serving_side_by_side(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        unused = parts.views.rollout("iris", "champion")
        assert (unused.desired, unused.serving, unused.phase, unused.since) == ("1", None, "unloaded", None)
        states = parts.views.alias_states()
        assert next(states) == (("iris", "champion"), (None, False))
        await parts.answers()
        assert list(states) == [], "an alias is not listed twice when it comes into use meanwhile"
        parts.of(2).fails = "ValueError: no"
        parts.file.write_text(parts.file.read_text().replace("champion: 1", "champion: 2"))
        await parts.watch.look()
        await until(lambda: parts.views.rollout("iris", "champion").phase == "refused")
        view = parts.views.rollout("iris", "champion")
        assert (view.desired, view.serving, view.last_good, view.diverged) == ("2", "1", "1", True)
        assert [stretch.version for stretch in view.history] == ["1"]
        assert view.to_json().keys() <= parts.views.rollout_in_full("iris", "champion").to_json().keys()
        assert list(parts.views.alias_states()) == [(("iris", "champion"), ("1", True))]


async def test_a_wrong_policy_in_the_registry_is_shown(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        assert "policy_error" not in parts.views.rollout_in_full("iris", "champion").to_json()
        parts.aliases.gates._policy = lambda model: (RolloutPolicy(), "canry: unknown key")
        assert (
            parts.views.rollout_in_full("iris", "champion").to_json()["policy_error"] == "canry: unknown key"
        )


async def test_what_was_tried_with_an_alias_that_does_not_exist(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        parts.of(2).fails = "ValueError: no"
        with pytest.raises(Problem):
            async with parts.promotions.promote("iris", "next", "2"):
                pass
        view = parts.views.rollout("iris", "next")
        assert (view.phase, view.desired, view.history) == ("refused", None, ())
        (rollouts,) = [part async for part in parts.views.rollouts()]
        assert rollouts[-1] == view
        with pytest.raises(Problem) as caught:
            parts.views.rollout("iris", "nobody")
        assert caught.value.code == "ALIAS_NOT_FOUND"


async def ready(parts: Composed, reference: Reference) -> str | None:
    return (await parts.views.readiness(reference))[1]


async def test_what_the_next_request_would_meet(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        assert await ready(parts, CHAMPION) is None  # not loaded: the request loads it
        hold = parts.of(1).hold = asyncio.Event()
        asked = asyncio.ensure_future(parts.ask(CHAMPION))
        await asyncio.sleep(0)
        assert await ready(parts, CHAMPION) is None  # it loads: the request waits for it
        hold.set()
        await asked
        assert await ready(parts, CHAMPION) is None
        parts.of(2).fails = "ValueError: no"
        second = Reference("iris", version="2")
        with pytest.raises(Problem):
            await parts.ask(second)
        assert "ValueError: no" in (await ready(parts, second) or "")
        with pytest.raises(Problem):
            await ready(parts, Reference("nobody"))


async def test_readiness_waits_for_what_must_be_loaded(tmp_path: Path) -> None:
    async with composed(tmp_path, preload=("iris",)) as parts:
        view = parts.views.ready()
        assert (view.ready, view.preload_pending, "draining" in view.to_json()) == (False, ["iris"], False)
        await parts.residency.preload()
        assert parts.views.ready().ready
        parts.preload.unused.sentences["irs"] = "models.irs matches no model of the registry"
        assert list(parts.views.ready().settings_unmatched) == ["irs"]
        assert parts.views.ready().without_names().settings_unmatched == {}
        stopping = parts.views.ready().stopping().to_json()
        assert (stopping["ready"], stopping["draining"]) == (False, True)
