"""The recorded answer of a package, seen from outside: logged, changed, served, shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pandas as pd
import pytest

import gateway
from tests.support.running import Running, running

KEY = "k" * 32
EXAMPLE = pd.DataFrame({"x": [1.0, 2.0]})


class Counting:
    """Its answers depend on the number of calls."""

    def predict(self, model_input: Any) -> list[int]:
        self.calls = getattr(self, "calls", 0) + 1
        return [self.calls] * len(model_input)


class Doubling:
    def predict(self, model_input: Any) -> list[dict[str, float]]:
        return [{"twice": 2 * x} for x in model_input["x"]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("answers")
    registry = directory / "registry.yaml"
    gateway.log_model(Doubling(), "doubling", registry, input_example=EXAMPLE, alias="champion")
    with pytest.warns(UserWarning, match="two answers to its input_example differ"):
        gateway.log_model(Counting(), "counting", registry, input_example=EXAMPLE, alias="champion")
    gateway.log_model(Counting(), "waived", registry, input_example=EXAMPLE, alias="champion", verify=False)
    with pytest.warns(UserWarning, match="unsigned has no signature"):
        gateway.log_model(Doubling(), "unsigned", registry, alias="champion", verify=False)
    # As on another machine: there the recorded answer is not the one that comes.
    package = directory / "models" / "doubling" / "1"
    file = package / "example_answer.json"
    assert json.loads(file.read_text()) == {"predictions": [{"twice": 2.0}, {"twice": 4.0}]}
    file.write_text(json.dumps({"predictions": [{"twice": 2.0}, {"twice": 5.0}]}))
    with pytest.warns(UserWarning, match=r"changed: .* at predictions\[1\]\.twice"):
        gateway.push(package, "changed", "champion", registry)
    (directory / "key").write_text(KEY)
    (directory / "gateway.yaml").write_text("models: {waived: {warm_up: false}}\n")
    with running(
        directory, "--registry", str(registry), GATEWAY_ADMIN_KEY_FILE=str(directory / "key")
    ) as server:
        yield server


def view(server: Running, path: str, key: str | None = None) -> Any:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.get(f"{server.url}/{path}", headers=headers).json()


def test_another_answer_than_the_recorded_one_is_warned_of_with_the_field(served: Running) -> None:
    assert served.predict("changed", [{"x": 1.0}]).json()["predictions"] == [{"twice": 2.0}]
    shown = view(served, "models/changed/versions/1")
    assert any("predictions[1].twice" in text for text in shown["warnings"])
    assert "5.0" not in json.dumps(shown["warnings"])
    (summary,) = view(served, "models/changed")["versions"]
    assert summary["warnings"] == shown["warnings"]
    assert any("predictions[1].twice" in line for line in served.lines)


def test_the_recorded_answer_is_shown_with_control_access_only(served: Running) -> None:
    for key in (None, "wrong"):
        shown = view(served, "models/changed/versions/1", key)
        assert "example_answer" not in shown
        assert "input_example" not in shown
    shown = view(served, "models/changed/versions/1", KEY)
    assert shown["example_answer"] == [{"twice": 2.0}, {"twice": 5.0}]


@pytest.mark.parametrize("name", ["counting", "waived"])
def test_the_first_real_answer_is_the_first(served: Running, name: str) -> None:
    assert served.predict(name, [{"x": 1.0}]).json()["predictions"] == [1]
    waived = any("warm_up is off" in text for text in view(served, f"models/{name}/versions/1")["warnings"])
    assert waived == (name == "waived")


def test_a_version_without_a_signature_is_marked(served: Running) -> None:
    served.predict("unsigned", [{"x": 1.0}])
    assert any("no signature" in text for text in view(served, "models/unsigned/versions/1")["warnings"])
