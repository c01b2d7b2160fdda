"""The remembered rollouts of an alias: plans, and what is left of them when the alias moves on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.aliasmemory import AliasMemory
from gateway.rollouts.course import Course
from gateway.rollouts.memory import Courses
from gateway.rollouts.phases import Phase
from gateway.state import State

IRIS = ("iris", "champion")


@pytest.fixture
def courses(tmp_path: Path) -> Iterator[Courses]:
    state = State(tmp_path)
    yield Courses(AliasMemory(state, "test", lambda write: write()), lambda: 100.0)
    state.close()


def canary(version: str = "2") -> Course:
    return Course(version, service="1").to(Phase.CANARY, 1.0)


def taken_back(version: str = "2") -> Course:
    return canary(version).to(Phase.ROLLED_BACK, 2.0, reason="errors")


def phase(courses: Courses) -> Phase:
    course = courses.of(*IRIS)
    assert course is not None
    return course.phase


def earlier(courses: Courses) -> list[tuple[str, str]]:
    course = courses.of(*IRIS)
    return [] if course is None else [(one["version"], one["phase"]) for one in course.earlier]


def test_a_plan_ends_an_earlier_try_of_the_version_and_can_be_undone(courses: Courses) -> None:
    courses.save(*IRIS, taken_back())
    undo = courses.plan(*IRIS, "2", None)
    assert phase(courses) is Phase.CHECKING
    assert earlier(courses) == [("2", "rolled_back")]
    undo()
    assert phase(courses) is Phase.ROLLED_BACK
    assert earlier(courses) == []


def test_a_plan_leaves_a_finished_rollout_of_the_version(courses: Courses) -> None:
    courses.save(*IRIS, canary().to(Phase.DONE, 2.0))
    courses.plan(*IRIS, "2", None)
    assert phase(courses) is Phase.DONE


def test_a_rollout_that_a_planned_one_ends_is_an_earlier_one_with_its_evidence(courses: Courses) -> None:
    courses.save(*IRIS, canary())
    courses.plan(*IRIS, "3", (5.0,), None)
    assert earlier(courses) == []
    ended = canary().to(Phase.SUPERSEDED, 2.0, evidence={"felt": 0})
    courses.superseded(*IRIS, ended)
    course = courses.of(*IRIS)
    assert course is not None
    assert (course.version, course.steps) == ("3", (5.0,))
    assert [one["evidence"] for one in course.earlier] == [{"felt": 0}]


def test_the_rollouts_under_way_are_those_that_have_not_ended(courses: Courses) -> None:
    courses.save("iris", "a", canary())
    courses.save("iris", "b", taken_back())
    assert courses.under_way() == [("iris", "a")]
