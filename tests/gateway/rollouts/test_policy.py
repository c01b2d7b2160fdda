"""Which rollout policy holds: three sources, merged key by key, and what a registry may not say."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from gateway.configuration import load
from gateway.registries import mlflow_answers
from gateway.registries.base import Model
from gateway.rollout_settings import RolloutPolicy
from gateway.rollouts.policy import policy_of
from gateway.settings import ModelSettings, Settings, SettingsError


def held(registry: dict[str, Any], own: dict[str, Any] | None = None, **models: Any) -> RolloutPolicy:
    policy, wrong = judged(registry, own, **models)
    assert wrong is None
    return policy


def judged(
    registry: dict[str, Any], own: dict[str, Any] | None = None, **models: Any
) -> tuple[RolloutPolicy, str | None]:
    settings = Settings(
        rollout=RolloutPolicy.model_validate(own or {}),
        models={
            name: ModelSettings(rollout=RolloutPolicy.model_validate(part)) for name, part in models.items()
        },
    )
    return policy_of(settings, Model("iris", {}, {}, registry))


def test_the_sources_are_merged_key_by_key() -> None:
    policy = held(
        {"canary": {"every": "5m"}, "guards": {"latency": "off"}},
        {"canary": {"steps": [5, 50], "every": 60, "requests": 7}, "thin": "refuse"},
        iris={"canary": {"requests": 9}},
    )
    canary = policy.canary
    assert (canary.steps, canary.every, canary.requests) == ([5, 50], 300, 9)
    assert (policy.thin, policy.guards.latency, policy.guards.errors) == ("refuse", None, 0.01)


def test_a_registry_reads_numbers_as_text_and_switches_a_canary_off() -> None:
    assert held({"canary": {"steps": ["10", "50"], "requests": "3"}}).canary.steps == [10, 50]
    assert held({"canary": "off"}, {"canary": {"steps": [5]}}).canary.steps == []


def test_off_switches_off_and_zero_is_a_number() -> None:
    policy = held(
        {"guards": {"errors": 0, "output": "off", "latency": False}, "watch": "off"}, {"watch": "10m"}
    )
    assert (policy.guards.errors, policy.guards.output, policy.guards.latency) == (0, None, None)
    assert policy.watch == 0
    assert held({"watch": "90s"}).watch == 90


def test_a_registry_may_tighten_and_not_loosen() -> None:
    assert held({"gate": "compatible"}, {"gate": "none"}).gate == "compatible"
    assert held({"environment": "refuse"}, {"environment": "warn"}).environment == "refuse"
    policy, wrong = judged({"gate": "none"})
    assert policy.gate == "compatible"
    assert wrong is not None
    assert "gate: none is less strict" in wrong
    assert "environment: warn" in (judged({"environment": "warn"})[1] or "")


def test_lock_ignores_registries() -> None:
    assert judged({"canary": {"steps": [5]}, "nonsense": 1}, {"lock": True})[0].canary.steps == []
    assert "lock" in (judged({"lock": True})[1] or "")


@pytest.mark.parametrize(
    ("registry", "said"),
    [
        ({"canry": {}}, "canry: unknown key, did you mean canary?"),
        ({"canary": {"step": [5]}}, "canary.step: unknown key, did you mean steps?"),
        ({"guards": {"errors": 2}}, "guards.errors"),
        ({"canary": {"steps": [50, 5]}}, "canary.steps: step 2 is 5, after 50; write percentages"),
        ({"canary": {"steps": [5, 25, 500]}}, "canary.steps: step 3 is 500; write percentages between 0 and"),
        ({"canary": {"steps": "5, many"}}, "canary.steps: step 2 is many; write percentages"),
        ({"canary": {"steps": 5}}, "canary.steps: it is not a list; write percentages"),
        ({"canary": {"steps": [5, 100]}}, "canary.steps: step 2 is 100; write"),
        ({"watch": "soon"}, "watch: write seconds, or a duration such as 5s or 2m"),
        ({"watch": {"for": 5}}, "watch"),
        ({"canary": {"key": "the user"}}, "canary.key: write the name of a header"),
        ({"shadow": {"shares": 1}}, "shadow.shares: unknown key, did you mean share?"),
        ({"shadow": {"share": 2}}, "shadow.share"),
        ({"shadow": {"share": 0}}, "shadow.share"),
        ({"replay": {"request": 5}}, "replay.request: unknown key, did you mean requests?"),
        ({"replay": {"agreement": 2}}, "replay.agreement"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(registry: dict[str, Any], said: str) -> None:
    policy, wrong = judged(registry, {"canary": {"steps": [7]}})
    assert said in (wrong or "")
    assert policy.canary.steps == [7]  # the operator's part holds alone
    with pytest.raises(ValidationError):
        RolloutPolicy.model_validate(registry)


def test_settings_say_which_keys_do_not_exist() -> None:
    with pytest.raises(SettingsError) as refused:
        load({"rollout": {"shadow": {"shares": 1}, "canary": {"step": [5]}, "wach": "5m"}}, {})
    said = str(refused.value)
    assert "did you mean share?" in said
    assert "did you mean steps?" in said
    assert "did you mean watch?" in said


def test_a_shadow_is_switched_on_and_off_key_by_key() -> None:
    own = {"shadow": {"share": 0.5, "requests": 50}}
    shadow = held({"shadow": {"requests": "70"}}, own).shadow
    assert shadow is not None
    assert (shadow.share, shadow.requests, shadow.agreement) == (0.5, 70, 0.98)
    assert held({"shadow": "off"}, own).shadow is None
    assert held({}).shadow is None


def test_the_tag_of_mlflow_is_yaml_or_json() -> None:
    assert mlflow_answers.rollout({"gateway.rollout": '{"canary": {"steps": [5]}}'}) == {
        "canary": {"steps": [5]}
    }
    assert mlflow_answers.rollout({"gateway.rollout": "canary: {steps: [5], key: X-User}"}) == {
        "canary": {"steps": [5], "key": "X-User"}
    }
    assert mlflow_answers.rollout({}) == {}
    for text in ("[5]", "{", "a: b: c"):
        _, wrong = judged(dict(mlflow_answers.rollout({"gateway.rollout": text})))
        assert "gateway.rollout" in (wrong or "")
