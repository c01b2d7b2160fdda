"""How few environments packages need."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from gateway.environments import plan
from gateway.environments.lock import Lock, Wanted
from tests.gateway.environments.test_lock import made


def test_packages_whose_locks_agree_share_one_environment() -> None:
    locks = {
        "a": made(numpy="1", pandas="2"),
        "b": made(numpy="1", sklearn="3"),
        "c": made(numpy="1"),
        "d": made(numpy="2"),
        "e": made((3, 9), numpy="1"),
    }
    groups = plan.grouped(locks)
    assert [group.members for group in groups] == [("a", "b", "c"), ("d",), ("e",)]
    assert all(groups[0].lock.satisfies(locks[name]) for name in "abc")


def test_a_lock_that_holds_the_others_is_taken_as_it_is() -> None:
    large = made(numpy="1", pandas="2")
    [group] = plan.grouped({"a": large, "b": made(numpy="1")})
    assert group.lock is large


def test_a_lock_that_allows_other_files_stays_apart() -> None:
    """Of one version, `b` allows fewer files than `a`, and `c` others."""
    files = {"a": "123", "b": "12", "c": "23"}
    locks = {
        name: replace(made(numpy="1"), hashes={"numpy": frozenset(kept)}) for name, kept in files.items()
    }
    groups = plan.grouped(locks)
    assert [group.members for group in groups] == [("a", "b"), ("c",)]
    assert plan.nested(locks["a"], locks["b"])
    assert not plan.nested(locks["b"], locks["c"])


def test_why_two_cannot_share_is_said() -> None:
    assert plan.conflicts(made(numpy="1"), made(numpy="2")) == ["numpy 1 and 2"]
    assert plan.conflicts(made(numpy="1"), made((3, 9), numpy="1")) == ["Python 3.8 and 3.9"]
    assert plan.conflicts(made(numpy="1"), made(pandas="2")) == []


DAY = datetime(2024, 5, 20, tzinfo=UTC)


def wishes(line: str, created: datetime = DAY) -> Wanted:
    return Wanted((line, "numpy"), created=created, mlflow="2.12.2")


def test_what_packages_left_open_is_resolved_together() -> None:
    """Each alone drew another numpy; both pins can be had with one."""
    asked: list[Wanted] = []

    def resolve(wanted: Wanted) -> Lock:
        asked.append(wanted)
        return made(numpy="1", sklearn="1", xgboost="2")

    alone = {"a": made(numpy="1", sklearn="1"), "b": made(numpy="2", xgboost="2")}
    wanted = {"a": wishes("sklearn==1"), "b": wishes("xgboost==2", DAY + timedelta(days=3))}
    [group] = plan.united(plan.grouped(alone), wanted, resolve)
    assert group.members == ("a", "b")
    assert dict(group.lock.packages) == {"numpy": "1", "sklearn": "1", "xgboost": "2"}
    [union] = asked
    assert set(union.requirements) == {"sklearn==1", "xgboost==2", "numpy"}
    assert (union.created, union.python) == (DAY + timedelta(days=3), (3, 8))


@pytest.mark.parametrize(
    ("wanted", "lock"),
    [
        ({"a": wishes("sklearn==1"), "b": wishes("sklearn==2")}, made(numpy="1")),
        ({"a": wishes("sklearn==1"), "b": wishes("xgboost==2", DAY + timedelta(days=90))}, made(numpy="1")),
        ({"a": wishes("sklearn==1"), "b": wishes("xgboost==2")}, None),
        ({"a": wishes("sklearn==1"), "b": wishes("xgboost==2")}, made((3, 9), numpy="1")),
    ],
    ids=["pins", "time", "nothing meets both", "only on another Python"],
)
def test_packages_stay_apart_where_they_must_and_why_is_said(
    wanted: dict[str, Wanted], lock: Lock | None
) -> None:
    alone = {"a": made(numpy="1", sklearn="1"), "b": made(numpy="2")}
    first, second = plan.united(plan.grouped(alone), wanted, lambda asked: lock)
    assert (first.members, second.members) == (("a",), ("b",))
    assert (first.apart, second.apart) == ((), ("apart from a: numpy 1 and 2",))
