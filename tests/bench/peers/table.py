"""The servers that are compared: how each is started, how it is asked for a row, and what its answer means.

Knows each server's command and forms. Does not know processes, load or figures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.peers.environments import Environment
from tests.bench.peers.load import Asked

HERE = Path(__file__).parent
APPS = HERE / "apps"
Row = list[float] | dict[str, float]
"""With the names of its columns, or without."""


@dataclass(frozen=True)
class Setup:
    """What a server is started with. `models` is what `models.py` wrote, `scratch` a directory of its own."""

    environment: Environment
    models: Path
    scratch: Path
    port: int
    room: int = 0
    """So many models, or 0: all."""

    @property
    def file(self) -> Path:
        onnx = self.models / "m0.onnx"
        return onnx if onnx.is_file() else self.models / "m0.pkl"


@dataclass(frozen=True)
class Start:
    command: list[str]
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    title: str
    environment: str
    start: Callable[[Setup], Start]
    asked: Callable[[str, Row], Asked]
    """A request for one row of one model."""
    answer: Callable[[Any], Any] = lambda parsed: parsed["predictions"]
    mlp: bool = True
    """Whether it serves an ONNX model."""
    constant: bool = False
    """It answers without a model, so there is nothing to check."""
    load: Callable[[str], Asked] | None = None
    """The request that loads a model, where the first prediction does not. Such a server evicts none."""


def flat(value: Any) -> list[float]:
    """The numbers of an answer, whatever they are wrapped in: an answer has one row."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in flat(part)]
    return [float(value)]


def _json(path: str, body: Any, *headers: tuple[str, str]) -> Asked:
    return Asked(path, json.dumps(body).encode(), headers)


def _tabular(row: Row) -> dict[str, Any]:
    if isinstance(row, dict):
        return {"dataframe_split": {"columns": list(row), "data": [list(row.values())]}}
    return {"inputs": [row]}


def _predict(name: str, row: Row) -> Asked:
    return _json(f"/predict/{name}", _tabular(row))


def _invocations(name: str, row: Row) -> Asked:
    return _json("/invocations", _tabular(row))


def _values(row: Row) -> list[float]:
    return list(row.values()) if isinstance(row, dict) else row


def _rows(name: str, row: Row) -> Asked:
    return _json("/predict", {"rows": [_values(row)]})


def _tensor(name: str, datatype: str, values: list[float]) -> dict[str, Any]:
    return {"name": name, "shape": [1, len(values)], "datatype": datatype, "data": values}


def _v2(name: str, row: Row) -> Asked:
    if isinstance(row, dict):
        form = "pd"
        inputs = [_tensor(column, "FP64", [value]) for column, value in row.items()]
    else:
        form = "np"
        inputs = [_tensor("x", "FP64" if len(row) == 4 else "FP32", row)]
    body = {"parameters": {"content_type": form}, "inputs": inputs}
    return _json(f"/v2/models/{name}/infer", body)


def _plain(kind: str) -> Callable[[Setup], Start]:
    def start(setup: Setup) -> Start:
        program = [setup.environment.python, str(HERE.parent / "plain_servers.py")]
        return Start([*program, kind, str(setup.port), str(setup.file)])

    return start


def _plain_many(setup: Setup) -> Start:
    program = [setup.environment.python, str(HERE.parent / "plain_servers.py"), "many"]
    return Start([*program, str(setup.port), str(setup.models), str(setup.room or 1 << 30)])


def _gateway(**environ: str) -> Callable[[Setup], Start]:
    def start(setup: Setup) -> Start:
        serve = [setup.environment.python, "-m", "gateway", "serve", "--port", str(setup.port)]
        own = {
            "GATEWAY_CACHE_DIR": str(setup.scratch / "cache"),
            "GATEWAY_STATE_DIR": str(setup.scratch / "state"),
            "GATEWAY_LOG_LEVEL": "warning",
            "GATEWAY_ENVIRONMENTS__BUILD": "never",
        }
        return Start([*serve, "--registry", str(setup.models / "registry.json")], own | environ)

    return start


def _mlflow(setup: Setup) -> Start:
    serve = [setup.environment.program("mlflow"), "models", "serve", "--env-manager", "local"]
    model = ["-m", str(setup.models / "mlflow" / "m0"), "-h", "127.0.0.1", "-p", str(setup.port)]
    return Start([*serve, *model], {"MLFLOW_DISABLE_TELEMETRY": "true"})


def _mlserver(runtime: str, *, at_once: bool = True, **settings: Any) -> Callable[[Setup], Start]:
    """One that holds the models of `setup.models`: at once, or when its repository API is asked to."""

    def start(setup: Setup) -> Start:
        from tests.bench.bench_serving import free_port

        own = {
            "host": "127.0.0.1",
            "http_port": setup.port,
            "grpc_port": free_port(),
            "metrics_port": free_port(),
            "debug": False,
            "load_models_at_startup": at_once,
        }
        setup.scratch.mkdir(parents=True, exist_ok=True)
        (setup.scratch / "settings.json").write_text(json.dumps(own))
        names = ["m0"] if at_once else [file.stem for file in setup.models.glob("m*.pkl")]
        for name in names:
            where = setup.models / (
                f"{name}.pkl" if runtime == "mlserver_sklearn.SKLearnModel" else f"mlflow/{name}"
            )
            model = {"name": name, "implementation": runtime, "parameters": {"uri": str(where)}, **settings}
            (setup.scratch / name).mkdir(exist_ok=True)
            (setup.scratch / name / "model-settings.json").write_text(json.dumps(model))
        return Start([setup.environment.program("mlserver"), "start", str(setup.scratch)])

    return start


def _mlserver_load(name: str) -> Asked:
    return Asked(f"/v2/repository/models/{name}/load", b"{}")


def _bentoml(batch: str) -> Callable[[Setup], Start]:
    def start(setup: Setup) -> Start:
        serve = [setup.environment.program("bentoml"), "serve", "bento_app:Model", "--working-dir", str(APPS)]
        environ = {"APPS": str(APPS), "MODEL": str(setup.file), "BATCH": batch}
        private = {"BENTOML_HOME": str(setup.scratch / "home"), "BENTOML_DO_NOT_TRACK": "True"}
        return Start([*serve, "--host", "127.0.0.1", "--port", str(setup.port)], environ | private)

    return start


def _litserve(most: int) -> Callable[[Setup], Start]:
    def start(setup: Setup) -> Start:
        app = [setup.environment.python, str(APPS / "litserve_app.py")]
        return Start([*app, str(setup.port), str(setup.file), str(most)])

    return start


def _ray(setup: Setup) -> Start:
    app = [setup.environment.python, str(APPS / "ray_app.py"), str(setup.port), str(setup.models)]
    scratch = Path("/tmp", f"ray-{setup.port}")  # a socket's path has at most 107 characters
    return Start([*app, str(setup.room or 1 << 30), str(scratch)], {"RAY_USAGE_STATS_ENABLED": "0"})


def _ray_asked(name: str, row: Row) -> Asked:
    return _json("/", {"rows": [_values(row)]}, ("serve_multiplexed_model_id", name))


def _v2_answer(parsed: Any) -> Any:
    return [output["data"] for output in parsed["outputs"]]


def _bento_answer(parsed: Any) -> Any:
    return parsed


SKLEARN, MLFLOW = "mlserver_sklearn.SKLearnModel", "mlserver_mlflow.MLflowRuntime"
ONE = {
    "ceiling": Peer("Starlette, a constant", "plain", _plain("ceiling"), _predict, constant=True),
    "by_hand": Peer("hand-written, on the loop", "plain", _plain("by_hand"), _predict),
    "in_thread": Peer("hand-written, in a thread", "plain", _plain("in_thread"), _predict),
    "gateway": Peer("gateway", "gateway", _gateway(), _predict),
    "gateway_inline": Peer("gateway, inline", "gateway", _gateway(GATEWAY_ISOLATION="inline"), _predict),
    "mlflow": Peer("MLflow models serve", "mlflow", _mlflow, _invocations),
    "mlserver": Peer("MLServer, sklearn", "mlserver", _mlserver(SKLEARN), _v2, _v2_answer, mlp=False),
    "mlserver_mlflow": Peer("MLServer, mlflow", "mlserver", _mlserver(MLFLOW), _v2, _v2_answer),
    "mlserver_batch": Peer(
        "MLServer, sklearn, batching",
        "mlserver",
        _mlserver(SKLEARN, max_batch_size=64, max_batch_time=0.002),
        _v2,
        _v2_answer,
        mlp=False,
    ),
    "bentoml": Peer("BentoML", "bentoml", _bentoml("0"), _rows, _bento_answer),
    "bentoml_batch": Peer("BentoML, batching", "bentoml", _bentoml("1"), _rows, _bento_answer),
    "litserve": Peer("LitServe", "litserve", _litserve(1), _rows),
    "litserve_batch": Peer("LitServe, batching", "litserve", _litserve(64), _rows),
}
MANY = {
    "by_hand": Peer("hand-written, all in one process", "plain", _plain_many, _predict),
    "gateway": Peer("gateway", "gateway", _gateway(), _predict),
    "mlserver": Peer(
        "MLServer, sklearn",
        "mlserver",
        _mlserver(SKLEARN, at_once=False),
        _v2,
        _v2_answer,
        load=_mlserver_load,
    ),
    "mlserver_mlflow": Peer(
        "MLServer, mlflow", "mlserver", _mlserver(MLFLOW, at_once=False), _v2, _v2_answer, load=_mlserver_load
    ),
    "ray": Peer("Ray Serve, multiplexed", "ray", _ray, _ray_asked),
}
