"""The durable state of a rollout: what survives JSON, and what stays of it after the next one."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from gateway.rollout_settings import RolloutPolicy
from gateway.rollouts.course import (
    CHANGES_KEPT,
    EARLIER_CHANGES_KEPT,
    EARLIER_KEPT,
    Course,
    policy_of_step,
)
from gateway.rollouts.phases import Phase

EVIDENCE = {"candidate": {"requests": 40, "errors": 0}}


def restarted(course: Course) -> Course:
    return Course.from_json(json.loads(json.dumps(course.to_json())))


def finished(version: str = "2", **said: Any) -> Course:
    course = Course(version, service="1").to(Phase.CANARY, 1.0, percent=20.0)
    return course.to(Phase.DONE, 2.0, **said)


def test_a_course_survives_json_and_keys_of_a_newer_gateway() -> None:
    course = replace(finished(evidence=EVIDENCE), steps=(5.0, 50.0), policy=RolloutPolicy().model_dump())
    again = Course("3", earlier=course.put_away(3.0)).to(Phase.CANARY, 4.0)
    assert restarted(course) == course
    assert restarted(again) == again
    assert Course.from_json({**course.to_json(), "later": 1}) == course


@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"canary": {"steps": [5, 50], "every": "2m", "key": "X-User-Id"}, "watch": "10m", "thin": "refuse"},
        {"shadow": {"share": 0.5}, "replay": {"requests": 10}, "guards": {"latency": "off", "errors": 0}},
    ],
)
def test_the_policy_of_a_step_survives_json(policy: dict[str, Any]) -> None:
    own = RolloutPolicy.model_validate(policy)
    course = restarted(Course("2", policy=own.model_dump(mode="json")))
    assert policy_of_step(course, RolloutPolicy(watch=7.0)).model_dump() == own.model_dump()


def test_without_a_readable_policy_of_its_own_a_step_follows_the_present_one() -> None:
    now = RolloutPolicy(watch=7.0)
    assert policy_of_step(Course("2"), now) is now
    assert policy_of_step(Course("2", policy={"of": "another edition"}), now) is now


def test_a_rollout_with_evidence_becomes_an_earlier_one_and_their_number_is_bounded() -> None:
    course = finished("1", evidence=EVIDENCE)
    for number in range(2, 2 * EARLIER_KEPT):
        assert course.put_away(9.0)[-1]["evidence"] == EVIDENCE
        course = replace(finished(str(number), evidence=EVIDENCE), earlier=course.put_away(9.0))
    assert len(course.earlier) == EARLIER_KEPT
    assert course.earlier[-1]["version"] == str(2 * EARLIER_KEPT - 2)


def test_the_changes_of_an_earlier_rollout_are_bounded() -> None:
    course = Course("2")
    for step in range(2 * CHANGES_KEPT):
        course = course.to(Phase.CANARY, float(step), step=step, evidence=EVIDENCE)
    assert len(course.changes) == CHANGES_KEPT
    (kept,) = course.put_away(999.0)
    assert len(kept["changes"]) == EARLIER_CHANGES_KEPT


def test_a_swap_without_evidence_is_left_to_the_history() -> None:
    assert finished().put_away(9.0) == ()
    assert Course("2").put_away(9.0) == ()


def test_a_rollout_that_was_under_way_is_superseded() -> None:
    (kept,) = Course("2").to(Phase.CANARY, 1.0).put_away(9.0)
    assert (kept["version"], kept["phase"], kept["reason"]) == ("2", "superseded", "the alias moved")
