"""Models whose versions differ in how often they fail."""

from __future__ import annotations

from typing import Any


class Picky:
    """Doubles x; version 2 cannot do so for one value in five."""

    def __init__(self, worst: int) -> None:
        self.worst = worst

    def predict(self, model_input: Any) -> Any:
        if ((model_input["x"] % 5) < self.worst).any():
            raise RuntimeError("no such region")
        return (model_input["x"] * 2).to_numpy()
