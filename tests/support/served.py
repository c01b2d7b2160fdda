"""A real gateway behind a real socket: uvicorn in a thread, a registry file, real models."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import pandas as pd
import pytest
import uvicorn
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

import gateway
from gateway import grpc
from gateway.app import Gateway
from gateway.http.build import build
from gateway.registries import open_registry
from gateway.registries.base import RegistryMissing
from gateway.settings import Settings

KEY = "the-admin-key"
ODD_NAME = "odd @%+ñ 名"
MAX_BODY = 200_000


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))

    @property
    def code(self) -> str:
        assert self.json["request_id"] == self.headers["x-request-id"]
        return str(self.json["error_code"])


class Served:
    """A gateway that runs, and how to reach it. `options` go to uvicorn."""

    def __init__(self, settings: Settings, registry: str, **options: Any) -> None:
        self._options = options
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(settings, registry)))
        self._failure: BaseException | None = None
        self.port = 0
        #: Where it answers over gRPC, with the setting `grpc_port`.
        self.grpc = ""

    async def _serve(self, settings: Settings, registry: str) -> None:
        try:
            self.gateway = Gateway(settings, open_registry(registry))
            self.loop = asyncio.get_running_loop()
            try:
                await self.gateway.start()
            except RegistryMissing as error:
                await self.gateway.stop()
                self._failure = error
                return
            fixed = {"lifespan": "off", "ws": "none", "log_config": None, "proxy_headers": False}
            config = uvicorn.Config(build(self.gateway.parts), **fixed, **self._options)
            self._server = uvicorn.Server(config)
            with socket.create_server(("127.0.0.1", 0)) as bound:
                self.port = bound.getsockname()[1]
                bound.listen()
                rpc = None
                if settings.grpc_port is not None:
                    rpc = grpc.rpc_server(self.gateway.parts)
                    self.grpc = await rpc.start()
                self._ready.set()
                await self._server.serve(sockets=[bound])
                if rpc is not None:
                    await rpc.close(settings.drain_timeout)
            await self.gateway.stop()
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._ready.set()

    def __enter__(self) -> Served:
        self._thread.start()
        self._ready.wait()
        if not self.port:
            self._thread.join()
        assert self.port, self._failure
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        assert self._failure is None

    @property
    def key(self) -> str | None:
        """The key that the gateway made for control calls; None where one is configured."""
        if self.gateway.settings.admin_key_file is not None:
            return None
        return (self.gateway.settings.state_dir / "control.key").read_text().strip()

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        content_type: str | None = "application/json",
        **headers: str,
    ) -> Reply:
        """One request on a connection of its own; what is not bytes or text is sent as JSON. Control calls
        carry the gateway's own key unless they bring an `authorization`."""
        data = body if isinstance(body, bytes | str | None) else json.dumps(body)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        predicts = path.startswith(("/predict", "/invocations", "/v1/", "/endpoints/"))
        if method not in ("GET", "HEAD") and not predicts and self.key:
            sent.setdefault("authorization", f"Bearer {self.key}")
        if data is not None and content_type is not None:
            sent["content-type"] = content_type
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            got = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, got, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.request("GET", path, **headers)

    def post(self, path: str, body: object = None, **headers: str) -> Reply:
        return self.request("POST", path, body, **headers)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)


def echo() -> Any:
    """A model that answers what its params ask for: a kind of value, an exception, or, as `ask:PORT`, only
    when the listener at that port has closed the connection that the model made. Its class is local, so
    that it is pickled by value."""

    class Echo:
        def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
            import decimal
            import socket

            wanted = (params or {}).get("give", "input")
            if wanted == "raise":
                raise ValueError("the row 4711 is bad")
            if wanted.startswith("ask:"):
                with socket.create_connection(("127.0.0.1", int(wanted[4:]))) as listener:
                    listener.recv(1)
            values: dict[str, Any] = {
                "nan": [float("nan"), float("inf")],
                "bytes": [b"\x00\xff" * 50],
                "decimal": [decimal.Decimal("0.10")],
                "object": [object()],
                "big": [2**63 - 1],
            }
            return values.get(wanted, len(model_input))

    return Echo()


def make_registry(directory: Path) -> str:
    registry = str(directory / "registry.yaml")
    data = load_iris(as_frame=True)
    frame = data.data.set_axis(["sl", "sw", "pl", "pw"], axis=1)
    for strength in (0.1, 1.0):
        model = LogisticRegression(C=strength, max_iter=500).fit(frame, data.target)
        example = frame.head(3)
        gateway.log_model(
            model,
            "iris",
            registry,
            input_example=example,
            alias=None if strength == 1.0 else "champion",
            verify=False,
        )
    gateway.log_model(model, ODD_NAME, registry, input_example=frame.head(3), alias="champion", verify=False)
    gateway.log_model(
        echo(),
        "echo",
        registry,
        input_example=pd.DataFrame({"x": [1.0]}),
        params={"give": "input"},
        alias="champion",
        verify=False,
    )
    tensor = LogisticRegression(max_iter=500).fit(frame.to_numpy(), data.target)
    gateway.log_model(
        tensor, "tensor", registry, input_example=np.asarray(frame.head(2)), alias="champion", verify=False
    )
    return registry


def settings(directory: Path, isolation: Literal["auto", "inline"] = "inline", **values: Any) -> Settings:
    """Settings of a gateway of its own; its models run in this process unless a test says otherwise, which
    saves the start of their processes where the test is about something else."""
    places = {"cache_dir": directory / "cache", "state_dir": directory / "state"}
    return Settings(isolation=isolation, memory_limit=2**31, **places, **values)


def path_of(name: str) -> str:
    return quote(name, safe="")
