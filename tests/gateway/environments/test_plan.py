"""How few environments packages need."""

from __future__ import annotations

from gateway.environments import plan
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


def test_why_two_cannot_share_is_said() -> None:
    assert plan.conflicts(made(numpy="1"), made(numpy="2")) == ["numpy 1 and 2"]
    assert plan.conflicts(made(numpy="1"), made((3, 9), numpy="1")) == ["Python 3.8 and 3.9"]
    assert plan.conflicts(made(numpy="1"), made(pandas="2")) == []
