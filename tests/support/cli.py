"""Models for the command line, and what its tests ask."""

from __future__ import annotations

from typing import Any

from tests.support.shell import Shell

FLOWER = {"sepal_length": 5.9, "sepal_width": 3.2, "petal_length": 4.8, "petal_width": 1.8}
ROW = {"dataframe_records": [FLOWER]}


class Adder:
    """A model that loads faster than scikit-learn is imported."""

    def __init__(self, term: float) -> None:
        self.term = term

    def predict(self, model_input: Any) -> Any:
        return model_input + self.term


class Unloadable:
    """Pickles well; unpickling it raises."""

    def predict(self, model_input: Any) -> Any:
        return model_input

    def __reduce__(self) -> Any:
        return (exec, ("raise RuntimeError('the weights are gone')",))


def aliases(shell: Shell) -> dict[str, str]:
    found: dict[str, str] = shell.called("models", "iris", "--output", "json").json()["aliases"]
    return found
