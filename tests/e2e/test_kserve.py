"""The runtimes for KServe: each is started as KServe starts it, and asked by KServe's own client.

As KServe does: `{{.Name}}` is the InferenceService's name, the files are in a read-only /mnt/models, the
command line and the environment are the runtime's. Changed: the ports, because this machine has one of each.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

import gateway
from tests.conftest import needs
from tests.support.containers import ROOT, tool
from tests.support.hostile import eventually
from tests.support.running import Running
from tests.support.shell import free_port

pytestmark = pytest.mark.all

RUNTIMES = ROOT / "deploy" / "kserve" / "runtimes.yaml"
NAME = "flowers"
SCRIPT = Path(__file__).with_name("foreign_clients.py")
ROWS = np.array([[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]])


def runtimes() -> dict[str, Any]:
    found = {one["metadata"]["name"]: one for one in yaml.safe_load_all(RUNTIMES.read_text(encoding="utf-8"))}
    assert set(found) == {f"gateway-{made}" for made in MAKE}
    return found


def flowers() -> tuple[Any, Any]:
    from sklearn.datasets import load_iris

    features, target = load_iris(return_X_y=True)
    return features, (target > 1).astype(int)


def mlflow(place: Path) -> Any:
    import pandas as pd
    from sklearn.linear_model import LogisticRegression

    features, target = flowers()
    frame = pd.DataFrame(features, columns=["sl", "sw", "pl", "pw"])
    model = LogisticRegression(max_iter=500).fit(frame, target)
    logged = gateway.log_model(
        model,
        name="iris",
        registry=str(place.parent / "registry.yaml"),
        input_example=frame.head(3),
        verify=False,
    )
    shutil.copytree(logged.source, place, dirs_exist_ok=True)
    return model.predict(pd.DataFrame(ROWS, columns=frame.columns))


def sklearn(place: Path) -> Any:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=500).fit(*flowers())
    (place / "model.pkl").write_bytes(pickle.dumps(model))
    return model.predict(ROWS)


def xgboost(place: Path) -> Any:
    made = needs("xgboost").XGBClassifier(n_estimators=3, n_jobs=1).fit(*flowers())
    made.save_model(place / "model.json")
    (place / "model.json").rename(place / "model.bst")
    return made.predict_proba(ROWS)[:, 1]


def lightgbm(place: Path) -> Any:
    made = needs("lightgbm").LGBMClassifier(n_estimators=3, verbose=-1, n_jobs=1).fit(*flowers())
    made.booster_.save_model(place / "model.txt")
    return made.booster_.predict(ROWS)


def onnx(place: Path) -> Any:
    made = needs("onnx")
    from onnx import TensorProto, helper

    taken = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    given = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "negated", [taken], [given])
    opset = [helper.make_opsetid("", 17)]
    made.save(helper.make_model(graph, opset_imports=opset, ir_version=8), str(place / "model.onnx"))
    return -ROWS.astype(np.float32)


MAKE: dict[str, Callable[[Path], Any]] = {
    "mlflow": mlflow,
    "sklearn": sklearn,
    "xgboost": xgboost,
    "lightgbm": lightgbm,
    "onnx": onnx,
}


@contextmanager
def started(runtime: dict[str, Any], directory: Path, files: Path) -> Iterator[tuple[Running, int]]:
    """The container of a runtime, as a process that sees `files` in /mnt/models; and its port for gRPC."""
    (container,) = runtime["spec"]["containers"]
    assert container["name"] == "kserve-container"
    grpc = free_port()
    arguments = [word.replace("{{.Name}}", NAME) for word in container["args"]]
    environ = {one["name"]: one["value"] for one in container["env"]}
    assert environ["GATEWAY_GRPC_PORT"] == "9000"
    environ |= {"GATEWAY_GRPC_PORT": str(grpc), "GATEWAY_PORT": str(free_port()), "GATEWAY_DRAIN_DELAY": "0s"}
    mounts = f"mount -t tmpfs none /mnt && mkdir /mnt/models && mount --bind {files} /mnt/models"
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    lasting = f'{mounts} && mount -o remount,bind,ro /mnt/models && exec "$@"'
    before = [tool("unshare"), "--mount", *user, "sh", "-c", lasting, "sh"]
    server = Running(directory, arguments, environ, port=None, before=before)
    probe = container["readinessProbe"]["httpGet"]["path"]
    try:
        # KServe sends no request before the probe succeeds.
        assert eventually(lambda: httpx.get(f"{server.url}{probe}").status_code == 200)
        yield server, grpc
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize("made", MAKE)
def test_a_runtime_answers_the_client_of_kserve(made: str, tmp_path: Path, clients: str) -> None:
    needs("grpc")  # the runtimes serve it
    runtime = runtimes()[f"gateway-{made}"]
    formats = runtime["spec"]["supportedModelFormats"]
    assert {one["name"] for one in formats} == {made}
    assert set(runtime["spec"]["protocolVersions"]) == {"v2", "grpc-v2"}
    files = tmp_path / "files"
    files.mkdir()
    wanted = MAKE[made](files)
    with started(runtime, tmp_path, files) as (server, grpc):
        command = [clients, str(SCRIPT), "runtime", server.url, NAME, f"127.0.0.1:{grpc}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        answers = yaml.safe_load(done.stdout)
    assert set(answers) == {"v2", "grpc-v2"}
    for answer in answers.values():
        np.testing.assert_allclose(np.array(answer).ravel(), np.asarray(wanted).ravel(), rtol=1e-5)


def test_the_image_is_the_one_of_the_chart() -> None:
    chart = yaml.safe_load((ROOT / "deploy/helm/Chart.yaml").read_text(encoding="utf-8"))
    for runtime in runtimes().values():
        (container,) = runtime["spec"]["containers"]
        assert container["image"] == f"model-gateway:{chart['appVersion']}"
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["port"] == 8080
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
