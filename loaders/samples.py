"""Three small sample models, two versions of each, trained here on data that scikit-learn contains.

    python -m loaders.samples DIRECTORY      writes DIRECTORY/NAME/VERSION, six packages

`iris` is scikit-learn with a table as input, `diabetes` is ONNX with a tensor, `tickets` is a plain Python
class with an artifact and a param. Runs as a program, so that the frameworks stay in its own process and the
class of `tickets` is pickled by value, as are all classes of `__main__`.
Needs scikit-learn (it ships both data sets) and onnx. Must not know registries and servers.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

NAMES = ("iris", "diabetes", "tickets")
VERSIONS = ("1", "2")

KEYWORDS: dict[str, dict[str, dict[str, float]]] = {
    "1": {
        "billing": {"invoice": 2.0, "refund": 2.0, "charged": 1.5, "card": 1.0},
        "login": {"password": 2.0, "sign": 1.0, "account": 1.0, "locked": 1.5},
    },
    "2": {
        "billing": {"invoice": 2.0, "refund": 2.0, "charged": 1.5, "card": 1.0},
        "login": {"password": 2.0, "sign": 1.0, "account": 0.5, "locked": 1.5},
        "shipping": {"parcel": 2.0, "delivery": 2.0, "arrived": 1.5, "address": 1.0},
    },
}
"""The weights of `tickets` by version: the weight of each word for each team. Saved as an artifact."""


class TicketRouter:
    """Chooses the team for a text by weighted keywords; below `threshold` (0 to 1) the answer is `unsure`."""

    def load_context(self, context: Any) -> None:
        with open(context.artifacts["keywords"], encoding="utf-8") as file:
            self.keywords: dict[str, dict[str, float]] = json.load(file)

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        threshold = (params or {}).get("threshold", 0.5)
        return [self._route(text, threshold) for text in model_input["text"]]

    def _route(self, text: str, threshold: float) -> dict[str, Any]:
        words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
        scores = {
            team: sum(weights.get(word, 0.0) for word in words) for team, weights in self.keywords.items()
        }
        total = sum(scores.values())
        team = max(scores, key=lambda name: scores[name])
        share = scores[team] / total if total else 0.0
        return {"team": team if total and share >= threshold else "unsure", "share": round(share, 3)}


def iris(version: str) -> tuple[Any, Any]:
    """A classifier of iris flowers and an input example; version 2 is a forest."""
    from sklearn.datasets import load_iris
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression

    data = load_iris(as_frame=True)
    table = data.data.rename(columns=lambda name: name.removesuffix(" (cm)").replace(" ", "_"))
    species = data.target_names[data.target]
    if version == "1":
        return LogisticRegression(max_iter=500).fit(table, species), table.head(3)
    return RandomForestClassifier(50, random_state=0).fit(table, species), table.head(3)


def diabetes(version: str) -> tuple[Any, Any]:
    """The progression of diabetes from ten measurements, as an ONNX graph that takes them in their own
    units, and an input example; version 1 is linear in them, version 2 in them and their squares."""
    from onnx import TensorProto, helper, numpy_helper
    from sklearn.datasets import load_diabetes
    from sklearn.linear_model import Ridge

    measured, progression = load_diabetes(return_X_y=True, scaled=False)
    mean, spread = measured.mean(axis=0), measured.std(axis=0)
    terms = (measured - mean) / spread
    nodes = [
        helper.make_node("Sub", ["measurements", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "spread"], ["scaled"]),
    ]
    if version == "2":
        terms = np.hstack([terms, terms**2])
        nodes += [
            helper.make_node("Mul", ["scaled", "scaled"], ["squares"]),
            helper.make_node("Concat", ["scaled", "squares"], ["terms"], axis=1),
        ]
    fitted = Ridge(alpha=1.0).fit(terms, progression)
    nodes.append(helper.make_node("Gemm", [nodes[-1].output[0], "weights", "bias"], ["progression"]))
    constants = {
        "mean": mean,
        "spread": spread,
        "weights": fitted.coef_.reshape(-1, 1),
        "bias": np.array([fitted.intercept_]),
    }
    graph = helper.make_graph(
        nodes,
        "diabetes",
        [helper.make_tensor_value_info("measurements", TensorProto.FLOAT, ["rows", 10])],
        [helper.make_tensor_value_info("progression", TensorProto.FLOAT, ["rows", 1])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model, measured[:3].astype(np.float32)


def write(directory: Path) -> None:
    """Writes the six packages. Raises what training or saving raises. Saves without verification, so that a
    person who tries the product does not wait for six more processes."""
    import pandas as pd

    from loaders import save_model

    for version in VERSIONS:
        model, example = iris(version)
        save_model(model, directory / "iris" / version, input_example=example, verify=False)
        model, example = diabetes(version)
        save_model(model, directory / "diabetes" / version, input_example=example, verify=False)
        with tempfile.TemporaryDirectory() as scratch:
            keywords = Path(scratch, "keywords.json")
            keywords.write_text(json.dumps(KEYWORDS[version]), encoding="utf-8")
            save_model(
                TicketRouter(),
                directory / "tickets" / version,
                input_example=pd.DataFrame({"text": ["I was charged twice, send a refund"]}),
                params={"threshold": 0.5},
                artifacts={"keywords": str(keywords)},
                verify=False,
            )


if __name__ == "__main__":
    write(Path(sys.argv[1]))
