"""A gateway over a real MLflow server, whose aliases MLflow's own client moves."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pytest

import gateway
import loaders
from gateway.registries import open_registry
from gateway.registries.base import Move
from tests.conftest import needs
from tests.e2e.test_watch import EXAMPLE, Doubles
from tests.support.callers import Callers
from tests.support.front import Authority, front
from tests.support.mlflow_server import SECRET, Server
from tests.support.running import Running, log_scaled, running
from tests.support.traffic import FACTORS, served, traffic, until

pytestmark = [
    pytest.mark.all,
    pytest.mark.filterwarnings("ignore"),
]  # what MLflow's client warns of is its own

LOGGING = """
import json, sys, mlflow, pandas as pd
class Times(mlflow.pyfunc.PythonModel):
    def __init__(self, factor): self.factor = factor
    def predict(self, context, model_input, params=None): return (model_input["x"] * self.factor).to_numpy()
mlflow.set_tracking_uri(sys.argv[1])
for factor in (10.0, 1000.0):
    with mlflow.start_run() as run:
        info = mlflow.pyfunc.log_model(name="logged", python_model=Times(factor), pip_requirements=[],
            input_example=pd.DataFrame({"x": [1.0]}), registered_model_name="times table")
print(json.dumps({"model_id": info.model_id, "run_id": run.info.run_id}))
"""
log = logging.getLogger("tests.mlflow")


@pytest.fixture(scope="module")
def logged(mlflow_server: Server) -> dict[str, str]:
    """Two versions of `times table`, logged and registered by MLflow's own client."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOGGING, mlflow_server.url],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    last: dict[str, str] = json.loads(done.stdout.splitlines()[-1] if done.stdout else "{}")
    return last


@pytest.fixture(scope="module")
def client(mlflow_server: Server) -> Any:
    return needs("mlflow").MlflowClient(tracking_uri=mlflow_server.url)


def test_mlflows_client_moves_an_alias_under_load(
    mlflow_server: Server, logged: dict[str, str], client: Any, tmp_path: Path
) -> None:
    client.set_registered_model_alias("times table", "moving", "1")
    with running(tmp_path, "--registry", mlflow_server.url, GATEWAY_POLL_INTERVAL="500ms") as server:
        assert served(server, "times table@moving") == "1"
        took = []
        with traffic(server.url, "times%20table@moving") as asked:
            for number in ("2", "1", "2"):
                client.set_registered_model_alias("times table", "moving", number)
                took.append(until(lambda wanted=number: served(server, "times table@moving") == wanted))
            until(lambda: asked.answers > 50)
        assert asked.failures == []
        for line in server.lines:
            assert "Traceback" not in line
    log.info("moved by MLflow's client, polled each 0.5 s: served after %s s", took)


def test_a_webhook_is_faster_than_the_poll(
    mlflow_server: Server, logged: dict[str, str], client: Any, tmp_path: Path
) -> None:
    client.set_registered_model_alias("times table", "hooked", "1")
    secret = tmp_path / "secret"
    secret.write_text(f"{SECRET}\n")
    environ = {"GATEWAY_POLL_INTERVAL": "10m", "GATEWAY_WEBHOOK_SECRET_FILE": str(secret)}
    with running(tmp_path, "--registry", mlflow_server.url, **environ) as server:
        assert served(server, "times table@hooked") == "1"
        made = mlflow_server.call(
            "POST",
            "webhooks",
            name="gateway",
            url=f"{server.url}/webhooks/mlflow",
            secret=SECRET,
            events=[{"entity": "MODEL_VERSION_ALIAS", "action": "CREATED"}],
        )["webhook"]
        try:
            tested = mlflow_server.call("POST", f"webhooks/{made['webhook_id']}/test")
            assert tested["result"]["success"], tested
            took = []
            with traffic(server.url, "times%20table@hooked") as asked:
                for number in ("2", "1"):
                    client.set_registered_model_alias("times table", "hooked", number)
                    took.append(until(lambda wanted=number: served(server, "times table@hooked") == wanted))
            assert asked.failures == []
        finally:
            mlflow_server.call("DELETE", f"webhooks/{made['webhook_id']}")
    log.info("moved by MLflow's client, by webhook: served after %s s", took)


def test_behind_a_proxy_with_a_token_and_an_authority_of_its_own(
    mlflow_server: Server, logged: dict[str, str], client: Any, tmp_path: Path
) -> None:
    client.set_registered_model_alias("times table", "proxied", "1")
    authority = Authority(tmp_path / "authority")
    with front(mlflow_server.url, token="of-the-test", tls=authority.server("127.0.0.1")) as before:
        environ = {  # what users of MLflow have set, and nothing else
            "MLFLOW_TRACKING_URI": before.url,
            "MLFLOW_TRACKING_TOKEN": "of-the-test",
            "MLFLOW_TRACKING_SERVER_CERT_PATH": str(authority.file),
        }
        with running(tmp_path, **environ) as server:
            assert served(server, "times table@proxied") == "1"
        assert set(before.authorizations) == {"Bearer of-the-test"}


def test_only_the_registry_ends_an_alias(mlflow_server: Server, client: Any, tmp_path: Path) -> None:
    for factor in FACTORS.values():
        log_scaled(mlflow_server.url, "ending", factor)  # type: ignore[arg-type]
    for alias, number in (("gone", "1"), ("kept", "2")):
        client.set_registered_model_alias("ending", alias, number)
    with running(tmp_path, "--registry", mlflow_server.url, GATEWAY_POLL_INTERVAL="200ms") as server:
        assert (served(server, "ending@gone"), served(server, "ending@kept")) == ("1", "2")
        client.delete_registered_model_alias("ending", "gone")
        until(lambda: served(server, "ending@gone") == "ALIAS_NOT_FOUND")
        client.delete_model_version("ending", "2")  # which takes its aliases with it
        until(lambda: httpx.get(f"{server.url}/rollouts/ending@kept").json()["diverged"])
        assert served(server, "ending@kept") == "2"
        client.delete_registered_model("ending")
        until(lambda: served(server, "ending@kept") == "MODEL_NOT_FOUND")


def test_a_version_that_is_worse_after_the_swap_is_taken_back_and_the_server_is_told(
    mlflow_server: Server, client: Any, tmp_path: Path
) -> None:
    for how in ("works", "raises"):
        gateway.log_model(
            Doubles(how), "watched", mlflow_server.url, input_example=EXAMPLE, metadata={"how": how}
        )
    client.set_registered_model_tag("watched", "gateway.rollout", "watch: 10m\nguards: {latency: off}")
    client.set_registered_model_alias("watched", "champion", "1")
    with running(tmp_path, "--registry", mlflow_server.url, GATEWAY_POLL_INTERVAL="500ms") as server:
        with Callers(server, "watched") as asked:
            asked.until(100)
            client.set_registered_model_alias("watched", "champion", "2")
            until(lambda: "gateway.verdict.champion" in client.get_model_version("watched", "2").tags)
            asked.until(20)
        assert {status for status, _ in asked.seen} == {200}
        view = httpx.get(f"{server.url}/rollouts/watched@champion").json()
        assert (view["phase"], view["serving"], view["desired"]) == ("rolled_back", "1", "2")
        told = json.loads(client.get_model_version("watched", "2").tags["gateway.verdict.champion"])
        assert (told["version"], told["outcome"]) == ("2", "rolled_back")
        assert told["reason"].startswith("errors: ")


def test_every_way_to_name_a_model(
    mlflow_server: Server, logged: dict[str, str], client: Any, tmp_path: Path
) -> None:
    def asked(server: Running, model: str) -> tuple[int, object]:
        sent = {"dataframe_records": [{"x": 2.0}], "model": model}
        answer = httpx.post(f"{server.url}/predict", json=sent, timeout=60)
        return answer.status_code, answer.json().get("predictions", answer.json().get("error_code"))

    with running(tmp_path, "--registry", mlflow_server.url, GATEWAY_POLL_INTERVAL="10m") as server:
        assert asked(server, "models:/times table/latest") == (200, [2000.0])
        assert asked(server, "models:/times table/1") == (200, [20.0])
        assert asked(server, f"models:/{logged['model_id']}") == (200, [2000.0])
        assert asked(server, "models:/times table/3") == (404, "VERSION_NOT_FOUND")
        assert asked(server, "models:/nobody@x") == (404, "MODEL_NOT_FOUND")
        assert asked(server, "models:/m-" + "0" * 32) == (404, "MODEL_NOT_FOUND")
        headers = {"X-Model": f"runs:/{logged['run_id']}/logged"}
        answer = httpx.post(
            f"{server.url}/predict", json={"dataframe_records": [{"x": 2.0}]}, headers=headers, timeout=60
        )
        assert answer.json()["predictions"] == [2000.0], answer.text
        listed = httpx.get(f"{server.url}/models").json()["models"]
        assert {model["name"] for model in listed} == {
            "times table",
            f"models:/{logged['model_id']}",
            f"runs:/{logged['run_id']}/logged",
        }
        # A version that is registered now is found at once, though the model was read before.
        log_scaled(mlflow_server.url, "growing", 10.0)  # type: ignore[arg-type]
        assert asked(server, "models:/growing/1") == (200, [20.0])
        assert asked(server, "models:/growing/2") == (404, "VERSION_NOT_FOUND")
        log_scaled(mlflow_server.url, "growing", 1000.0)  # type: ignore[arg-type]
        assert asked(server, "models:/growing/2") == (200, [2000.0])


def test_the_digest_of_the_first_fetch_is_written_back_and_holds(
    mlflow_server: Server, logged: dict[str, str], client: Any, tmp_path: Path
) -> None:
    client.set_registered_model_alias("times table", "digested", "1")
    with running(tmp_path, "--registry", mlflow_server.url) as server:
        assert served(server, "times table@digested") == "1"
    digest = client.get_model_version("times table", "1").tags["gateway.digest"]
    assert digest.startswith("sha256:")
    new = tmp_path / "new"
    new.mkdir()
    client.set_model_version_tag("times table", "1", "gateway.digest", "sha256:" + "0" * 64)
    try:
        with running(new, "--registry", mlflow_server.url) as server:
            answer = server.predict("times table@digested", [{"x": 1.0}])
            assert answer.json()["error_code"] == "MODEL_UNAVAILABLE"
            assert "digest mismatch" in answer.json()["message"]
    finally:
        client.set_model_version_tag("times table", "1", "gateway.digest", digest)


def test_the_gateway_writes_the_registry(mlflow_server: Server, client: Any, tmp_path: Path) -> None:
    for factor in FACTORS.values():
        log_scaled(mlflow_server.url, "written", factor)  # type: ignore[arg-type]
    open_registry(mlflow_server.url).move(Move("written", "champion", "1"))
    with running(tmp_path, "--registry", mlflow_server.url, GATEWAY_POLL_INTERVAL="10m") as server:
        assert served(server, "written") == "1"
        path = f"{server.url}/models/written/aliases/champion"
        wrong = httpx.put(path, json={"version": "2", "expect": "7"}, headers=server.key, timeout=60)
        assert wrong.status_code == 412
        moved = httpx.put(
            path,
            json={"version": "2", "expect": "1"},
            params={"wait": "true"},
            headers=server.key,
            timeout=60,
        )
        assert (moved.status_code, moved.json()["serving"]) == (200, "2")
        assert client.get_model_version_by_alias("written", "champion").version == "2"
        back = httpx.post(f"{path}/rollback", params={"wait": "true"}, headers=server.key, timeout=60)
        assert (back.status_code, back.json()["serving"]) == (200, "1")
        assert client.get_model_version_by_alias("written", "champion").version == "1"
    model = gateway.load_model("models:/written@champion", registry=mlflow_server.url)
    assert list(model.predict({"x": [3.0]})) == [30.0]


def test_a_refusal_is_seen_in_mlflow(
    mlflow_server: Server, logged: dict[str, str], client: Any, tmp_path: Path
) -> None:
    log_scaled(mlflow_server.url, "refused", 10.0, "champion")  # type: ignore[arg-type]
    other = tmp_path / "other"
    loaders.save_model(Summed(), other, input_example=pd.DataFrame({"left": [1.0], "right": [2.0]}))
    gateway.push(other, "refused", registry=mlflow_server.url)
    environ = {"GATEWAY_POLL_INTERVAL": "200ms", "GATEWAY_MLFLOW_STATUS": "true"}
    with running(tmp_path, "--registry", mlflow_server.url, **environ) as server:
        assert served(server, "refused") == "1"
        client.set_registered_model_alias("refused", "champion", "2")
        until(lambda: "gateway.status.champion" in client.get_model_version("refused", "2").tags)
        told = client.get_model_version("refused", "2").tags["gateway.status.champion"]
        assert told.startswith("refused: refused/2 may not replace refused/1: ")
        assert served(server, "refused") == "1"


class Summed:
    def predict(self, model_input: Any) -> Any:
        return (model_input["left"] + model_input["right"]).to_numpy()


def test_a_gateway_is_another_ones_registry(mlflow_server: Server, client: Any, tmp_path: Path) -> None:
    log_scaled(mlflow_server.url, "relayed", 10.0, "champion")  # type: ignore[arg-type]
    with running(tmp_path, "--registry", mlflow_server.url) as first:
        assert served(first, "relayed") == "1"
        document = f"{first.url}/registry.yaml"
        answer = httpx.get(document)
        again = httpx.get(document, headers={"If-None-Match": answer.headers["etag"]})
        assert (answer.status_code, again.status_code) == (200, 304)
        second_place = tmp_path / "second"
        second_place.mkdir()
        with running(second_place, "--registry", document, GATEWAY_POLL_INTERVAL="200ms") as second:
            assert served(second, "relayed") == "1"
            refused = httpx.put(
                f"{second.url}/models/relayed/aliases/champion",
                json={"version": "1"},
                headers=second.key,
                timeout=60,
            )
            assert refused.json()["error_code"] == "REGISTRY_READ_ONLY"
