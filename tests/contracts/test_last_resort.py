"""Models of mlflow's flavors that have no loader of ours: mlflow itself loads them, in a model process.

Real packages, written by mlflow with the real frameworks; each must answer what `mlflow.pyfunc` answers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest

from loaders import flavors, package
from tests.conftest import needs
from tests.support.running import Running, running

pytestmark = [pytest.mark.all, pytest.mark.filterwarnings("ignore")]


def keras(place: str) -> Any:
    """With torch below it, which the contracts of another flavor need anyway."""
    layers = needs("keras")
    model = layers.Sequential([layers.layers.Input((2,)), layers.layers.Dense(1)])
    flavor = needs("mlflow.keras")
    data = np.arange(4, dtype=np.float32).reshape(2, 2)
    signature = needs("mlflow").models.infer_signature(data, model.predict(data, verbose=0))
    Path(place).mkdir()  # mlflow 3.17 saves no example into a directory that is not there
    flavor.save_model(model, place, signature=signature, pip_requirements=_pinned("keras"))
    return data


def pmdarima(place: str) -> Any:
    model = needs("pmdarima").ARIMA(order=(1, 0, 0)).fit(np.sin(np.arange(40.0)))
    data = pd.DataFrame({"n_periods": [3]})
    needs("mlflow.pmdarima").save_model(
        model, place, input_example=data, pip_requirements=_pinned("pmdarima")
    )
    return data


def prophet(place: str) -> Any:
    days = pd.DataFrame({"ds": pd.date_range("2024-01-01", periods=40), "y": np.arange(40.0)})
    plain = dict.fromkeys(("weekly_seasonality", "yearly_seasonality", "daily_seasonality"), False)
    model = needs("prophet").Prophet(uncertainty_samples=0, **plain).fit(days)
    data = days[["ds"]][:2]
    needs("mlflow.prophet").save_model(model, place, input_example=data, pip_requirements=_pinned("prophet"))
    return data


def _pinned(module: str) -> list[str]:
    return [f"mlflow=={needs('mlflow').__version__}", f"{module}=={needs(module).__version__}"]


KINDS: dict[str, Callable[[str], Any]] = {"keras": keras, "pmdarima": pmdarima, "prophet": prophet}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any, Any]]:
    """By kind: the package, rows for it, and what mlflow answers."""
    needs("mlflow")
    os.environ["KERAS_BACKEND"] = "torch"
    root = tmp_path_factory.mktemp("mlflow")
    found = {}
    for kind, save in KINDS.items():
        data = save(str(root / kind))
        found[kind] = (root / kind, data, needs("mlflow.pyfunc").load_model(str(root / kind)).predict(data))
    return found


@pytest.fixture(scope="module")
def server(
    saved: dict[str, tuple[Path, Any, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("gateway")
    (directory / "gateway.yaml").write_text("models: {keras: {env: [KERAS_BACKEND]}}\n", encoding="utf-8")
    packages = [str(path) for path, _, _ in saved.values()]
    # mlflow and torch take long to import where bytecode is compiled first.
    with running(directory, *packages, KERAS_BACKEND="torch", GATEWAY_COLD_WAIT="300") as found:
        yield found


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_mlflow_alone_can_load_answers_as_in_mlflow(
    kind: str, saved: dict[str, tuple[Path, Any, Any]], server: Running
) -> None:
    path, data, expected = saved[kind]
    assert flavors.find(package.read(path)).name == "mlflow", "no loader of ours knows it"
    if isinstance(data, np.ndarray):
        body: dict[str, Any] = {"inputs": data.tolist()}
    else:
        rows = data.to_json(orient="split", index=False, date_format="iso")
        body = {"dataframe_split": pd.io.json.ujson_loads(rows)}
    answer = httpx.post(f"{server.url}/predict/{kind}", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    assert "x-model-warnings" not in answer.headers, "it runs in its own environment: this one"
    got = pd.DataFrame(answer.json()["predictions"])
    wanted = pd.DataFrame(np.asarray(expected)) if not isinstance(expected, pd.DataFrame) else expected
    numbers = wanted.select_dtypes("number")
    assert len(got) == len(wanted)
    np.testing.assert_allclose(
        got[numbers.columns].to_numpy(float), numbers.to_numpy(float), rtol=1e-5, atol=1e-6
    )
