"""The one set of gates: what each refuses, in which order, and what force overrules."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.errors import Problem
from gateway.registries.base import Model, Verdict, Version
from gateway.rollout_settings import RolloutPolicy
from gateway.rollouts.gates import Gates, Passed, Trial, refusals
from gateway.rollouts.records import Record
from loaders.schema import Scalar
from loaders.signature import ColSpec, Signature
from tests.support.controlled import Bench, turns, version

pytestmark = pytest.mark.anyio

NARROW = Signature(inputs=(ColSpec(Scalar.long, "a"),))
WIDE = Signature(inputs=(ColSpec(Scalar.long, "a"), ColSpec(Scalar.long, "b")))


def record(against: Version | None = None, **more: object) -> Record:
    model = Model("iris", {str(n): version(n) for n in (1, 2)}, {})
    return replace(Record(model, against), **more)  # type: ignore[arg-type]


def bench(tmp_path: Path) -> tuple[Bench, Gates]:
    made = Bench(tmp_path)
    return made, Gates(made.manager, prepare=made.prepare)


async def refused(gates: Gates, target: Version, known: Record, *, force: bool = False) -> Problem:
    with pytest.raises(Problem) as caught:
        await gates.check(target, known, force=force)
    return caught.value


async def test_a_version_that_passes_is_loaded_and_held(tmp_path: Path) -> None:
    made, gates = bench(tmp_path)
    trial = Trial("2")
    passed = await gates.check(version(2), record(), trial=trial)
    assert made.manager.is_ready(version(2))
    assert made.ledger[passed.lease.servable].leases == 1
    names = [name for name, _ in trial.checks]
    assert [name.partition(",")[0] for name in names] == ["files", "signature", "load"]
    passed.lease.release()


Setup = Callable[[Bench], Record]


def broken_files(made: Bench) -> Record:
    made.behaviour(version(2)).unavailable = "the digest of iris/2 is another one"
    return record(version(1))


def broken_load(made: Bench) -> Record:
    made.behaviour(version(2)).fails = "ValueError: bad weights"
    return record(version(1))


def other_signature(made: Bench) -> Record:
    made.behaviour(version(1)).signature, made.behaviour(version(2)).signature = NARROW, WIDE
    return record(version(1))


def found_wanting(made: Bench) -> Record:
    return record(version(1), verdict=Verdict("2", "refused", "it answers nonsense"))


@pytest.mark.parametrize(
    ("setup", "code", "says", "overruled"),
    [
        (broken_files, "MODEL_UNAVAILABLE", "digest", False),
        (broken_load, "MODEL_UNAVAILABLE", "bad weights", False),
        (other_signature, "ROLLOUT_REFUSED", "may not replace iris/1", True),
        (found_wanting, "ROLLOUT_REFUSED", "by another gateway: it answers nonsense", True),
    ],
    ids=["files", "load", "signature", "verdict"],
)
async def test_what_a_gate_refuses(
    setup: Setup, code: str, says: str, overruled: bool, tmp_path: Path
) -> None:
    made, gates = bench(tmp_path)
    known = setup(made)
    problem = await refused(gates, version(2), known)
    assert problem.code == code
    assert says in problem.message
    made.manager.retry(version(2))
    if overruled:
        passed = await gates.check(version(2), known, force=True)
        passed.lease.release()
    else:
        assert (await refused(gates, version(2), known, force=True)).code == code


async def test_a_version_that_states_its_signature_after_its_load_is_compared_then(tmp_path: Path) -> None:
    made, gates = bench(tmp_path)
    made.behaviour(version(1)).accepts, made.behaviour(version(2)).accepts = NARROW, WIDE
    (await gates.check(version(1), record())).lease.release()
    assert "may not replace iris/1" in (await refused(gates, version(2), record(version(1)))).message
    passed = await gates.check(version(2), record(version(1)), force=True)
    assert len(passed.overruled) == 1
    passed.lease.release()
    made.behaviour(version(3)).accepts = NARROW
    (await gates.check(version(3), record(version(1)))).lease.release()


async def test_a_version_that_is_not_registered_is_not_fetched(tmp_path: Path) -> None:
    made, gates = bench(tmp_path)
    problem = await refused(gates, Version("iris", "9", source=""), record())
    assert problem.code == "VERSION_NOT_FOUND"
    assert made.prepared == {}


async def test_the_way_back_to_a_version_that_has_served_is_open(tmp_path: Path) -> None:
    made, gates = bench(tmp_path)
    known = replace(other_signature(made), served=frozenset({"2"}))
    passed = await gates.check(version(2), known)
    assert passed.overruled == ()
    passed.lease.release()


@pytest.mark.parametrize(
    ("before", "answers", "policy", "refuses"),
    [
        ((), ("a is text, the schema says long",), RolloutPolicy(), True),
        ((), (), RolloutPolicy(), False),
        ((), None, RolloutPolicy(), False),  # it has no example
        (None, ("a is text, the schema says long",), RolloutPolicy(), False),
        (("it is missing",), ("a is text, the schema says long",), RolloutPolicy(), False),
        ((), ("a is text, the schema says long",), RolloutPolicy(gate="none"), False),
    ],
)
async def test_an_output_that_its_schema_does_not_describe_is_refused_if_that_of_the_version_in_service_is(
    tmp_path: Path,
    before: tuple[str, ...] | None,
    answers: tuple[str, ...] | None,
    policy: RolloutPolicy,
    refuses: bool,
) -> None:
    made = Bench(tmp_path)
    gates = Gates(made.manager, prepare=made.prepare, policy=lambda model: (policy, None))
    for number, misfits in ((1, before), (2, answers)):
        passed = await gates.check(version(number), record())
        passed.lease.servable.misfits = misfits
        passed.lease.release()
    if refuses:
        problem = await refused(gates, version(2), record(version(1)))
        assert problem.code == "ROLLOUT_REFUSED"
        assert "as its output schema says: a is text" in problem.message
        (await gates.check(version(2), record(version(1)), force=True)).lease.release()
        (await gates.check(version(2), record(version(1), served=frozenset({"2"})))).lease.release()
    else:
        (await gates.check(version(2), record(version(1)))).lease.release()


def test_signatures_are_compared_unless_the_policy_says_otherwise() -> None:
    assert refusals(RolloutPolicy(), NARROW, NARROW) == []
    assert refusals(RolloutPolicy(), NARROW, WIDE) != []
    assert refusals(RolloutPolicy(gate="none"), NARROW, WIDE) == []


async def test_a_wrong_policy_in_the_registry_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = Bench(tmp_path)
    gates = Gates(made.manager, prepare=made.prepare, policy=lambda model: (RolloutPolicy(), "gate: unknown"))
    model = Model("iris", {}, {})
    for _ in range(3):
        gates.policy(model)
    assert [one.message for one in caplog.records] == ["gate: unknown; the gateway's own policy is used"]
    assert gates.policy_error(model) == "gate: unknown"


@pytest.mark.parametrize("fails", [None, "no"])
async def test_a_caller_who_leaves_as_the_check_ends_leaves_no_lease(
    fails: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, gates = bench(tmp_path)
    made.behaviour(version(2)).fails = fails
    said: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: said.append(context["message"]))
    check = gates.check

    async def then_leaves(target: Version, known: Record) -> Passed:
        try:
            return await check(target, known)
        finally:
            asking.cancel()

    monkeypatch.setattr(gates, "check", then_leaves)
    asking = asyncio.ensure_future(gates.check_unless(asyncio.Event(), version(2), record()))
    with pytest.raises(asyncio.CancelledError):
        await asking
    await turns()
    gc.collect()
    assert [account.leases for account in made.ledger] == ([0] if fails is None else [])
    assert said == []
