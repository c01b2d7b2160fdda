"""Registers a version of iris that answers its example, and fails for large petals (one flower in three).

python bad_iris.py registry.yaml
"""

import sys

from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

import gateway


class Hasty:
    def __init__(self, model):
        self.model = model

    def predict(self, model_input, params=None):
        if (model_input["petal_length"] > 4.9).any():
            raise ValueError("no flower has such petals")
        return self.model.predict(model_input)


data = load_iris(as_frame=True)
table = data.data.rename(columns=lambda name: name.removesuffix(" (cm)").replace(" ", "_"))
model = LogisticRegression(max_iter=500).fit(table, data.target_names[data.target])
version = gateway.log_model(Hasty(model), name="iris", registry=sys.argv[1], input_example=table.head(3))
print(f"iris/{version.version} is in {sys.argv[1]}")
