"""What each call over gRPC needs: one table, which every call must be in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest

from tests.conftest import needs

needs("grpc")

import grpc  # noqa: E402

from gateway.grpc import inference_pb2 as pb  # noqa: E402
from gateway.grpc.inference import OpenInference  # noqa: E402
from tests.support import rpc  # noqa: E402
from tests.support.guarded import bearer, guarded  # noqa: E402
from tests.support.served import Served, make_registry  # noqa: E402

Need = Literal["open", "predict", "read", "list", "control"]

CALLS: dict[str, Need] = {
    "ServerLive": "open",
    "ServerReady": "open",
    "ServerMetadata": "open",
    "ModelReady": "read",
    "ModelMetadata": "read",
    "ModelInfer": "predict",
    "RepositoryIndex": "list",
    "RepositoryModelLoad": "control",
    "RepositoryModelUnload": "control",
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("guarded")
    with guarded(make_registry(tmp_path_factory.mktemp("registry")), directory, grpc_port=0) as made:
        yield made


def test_every_call_has_its_entry(served: Served) -> None:
    assert OpenInference(served.gateway.parts).methods.keys() == CALLS.keys()


@pytest.fixture(scope="module")
def called(served: Served) -> Iterator[rpc.Caller]:
    with rpc.caller(served.grpc) as made:
        yield made


def status(called: rpc.Caller, name: str, model: str, caller: str | None) -> str:
    kind = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name[name].input_type
    request = getattr(pb, kind.name)()
    field = {"Model": "name", "Repos": "model_name"}[name[:5]] if name[:6] != "Server" else ""
    if name == "ModelInfer":
        field = "model_name"
    if field and name != "RepositoryIndex":
        setattr(request, field, model)
    try:
        called.call(name, request, **bearer(caller))
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


@pytest.mark.parametrize("name", CALLS)
def test_what_a_call_needs(called: rpc.Caller, name: str) -> None:
    need = CALLS[name]
    if need == "open":
        assert status(called, name, "iris", None) == "OK"
        return
    assert status(called, name, "iris", None) == "UNAUTHENTICATED"
    allowed = {
        "predict": {"alice", "admin"},
        "read": {"alice", "op", "admin"},
        "list": {"alice", "bob", "op", "admin"},
        "control": {"op", "admin"},
    }[need]
    for caller in ("alice", "bob", "op", "admin"):
        said = status(called, name, "iris", caller)
        assert (said == "PERMISSION_DENIED") == (caller not in allowed), (caller, said)
        assert said != "UNAUTHENTICATED"
    if need not in ("list", "open"):
        assert status(called, name, "nope", "bob") == "PERMISSION_DENIED"


def test_an_index_over_grpc_leaves_out_what_a_caller_may_not_read(called: rpc.Caller) -> None:
    answer, _ = called.call("RepositoryIndex", pb.RepositoryIndexRequest(), **bearer("alice"))
    assert {one.name for one in answer.models} == {"iris"}


def test_a_stream_checks_each_message(called: rpc.Caller) -> None:
    stream = called._channel.stream_stream(
        rpc.SERVICE + "ModelStreamInfer",
        request_serializer=pb.ModelInferRequest.SerializeToString,
        response_deserializer=pb.ModelStreamInferResponse.FromString,
    )
    asked = [pb.ModelInferRequest(model_name=name) for name in ("echo", "iris")]
    said = [one.error_message for one in stream(iter(asked), metadata=[*bearer("alice").items()])]
    assert "FORBIDDEN" in said[0]
    assert "FORBIDDEN" not in said[1]
