"""Asks a gateway with one of other projects' own clients. Runs in an environment of its own. Its arguments
are the client's name, the gateway's URL, its control key and its address for gRPC; it imports nothing of the
gateway. A client has a process of its own: two that bring the same protocol's messages exclude each other.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np

ROWS = np.array([[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]])
NAMES = ("sl", "sw", "pl", "pw")
WANTED = [0, 2]


def triton(url: str, key: str) -> None:
    import tritonclient.http as client
    from tritonclient.utils import InferenceServerException

    server = client.InferenceServerClient(url.removeprefix("http://"))
    assert server.is_server_live()
    assert server.is_server_ready()
    assert "binary_tensor_data" in server.get_server_metadata()["extensions"]
    metadata = server.get_model_metadata("iris")
    assert [one["name"] for one in metadata["inputs"]] == list(NAMES)
    assert metadata["versions"] == ["1", "2"]
    assert server.is_model_ready("iris")
    assert server.is_model_ready("iris", "2")
    assert not server.is_model_ready("nothing")
    for binary in (True, False):
        inputs = []
        for name, column in zip(NAMES, ROWS.T, strict=True):
            inputs.append(client.InferInput(name, [2], "FP64"))
            inputs[-1].set_data_from_numpy(np.ascontiguousarray(column), binary_data=binary)
        outputs = [client.InferRequestedOutput("predictions", binary_data=binary)]
        for options in ({}, {"outputs": outputs}, {"model_version": "1"}, {"request_id": "7"}):
            answer = server.infer("iris", inputs, **options)
            assert answer.as_numpy("predictions").tolist() == WANTED
            assert answer.get_response().get("id", "7") == "7"
    wrong = client.InferInput("sl", [1], "INT64")
    wrong.set_data_from_numpy(np.array([1]))
    refused = ""
    try:
        server.infer("iris", [wrong])
    except InferenceServerException as error:
        refused = error.message()
    assert "signature" in refused
    control = {"authorization": f"Bearer {key}"}
    server.unload_model("iris", headers=control)
    server.load_model("iris", headers=control)
    assert {one["name"] for one in server.get_model_repository_index()} >= {"iris"}


async def kserve(url: str, key: str) -> None:
    from kserve import InferenceRESTClient, InferInput, InferRequest
    from kserve.inference_client import RESTConfig

    second = InferenceRESTClient(RESTConfig(protocol="v2"))
    assert await second.is_server_live(url)
    assert await second.is_server_ready(url)
    assert await second.is_model_ready(url, "iris")
    for binary in (False, True):
        inputs = []
        for name, column in zip(NAMES, ROWS.T, strict=True):
            inputs.append(InferInput(name, [2], "FP64"))
            inputs[-1].set_data_from_numpy(np.ascontiguousarray(column), binary_data=binary)
        answer = await second.infer(url, InferRequest("iris", inputs), model_name="iris")
        assert list(answer.outputs[0].as_numpy()) == WANTED
    first = InferenceRESTClient(RESTConfig(protocol="v1"))
    assert await first.is_model_ready(url, "iris")
    answer = await first.infer(url, {"instances": ROWS.tolist()}, model_name="iris")
    assert answer["predictions"] == WANTED


def triton_grpc(address: str, key: str) -> None:
    import queue

    import tritonclient.grpc as client
    from tritonclient.utils import InferenceServerException

    server = client.InferenceServerClient(address)
    assert server.is_server_live()
    assert server.is_server_ready()
    assert server.get_server_metadata().name == "model-gateway"
    metadata = server.get_model_metadata("iris")
    assert [one.name for one in metadata.inputs] == list(NAMES)
    assert list(metadata.versions) == ["1", "2"]
    assert server.is_model_ready("iris")
    assert server.is_model_ready("iris", "2")
    inputs = []
    for name, column in zip(NAMES, ROWS.T, strict=True):
        inputs.append(client.InferInput(name, [2], "FP64"))
        inputs[-1].set_data_from_numpy(np.ascontiguousarray(column))
    outputs = [client.InferRequestedOutput("predictions")]
    for options in ({}, {"outputs": outputs}, {"model_version": "1"}, {"request_id": "7"}):
        answer = server.infer("iris", inputs, client_timeout=30, **options)
        assert answer.as_numpy("predictions").tolist() == WANTED
        assert answer.get_response().id == options.get("request_id", "")
    for name, wanted in (("iris", "INVALID_INPUT"), ("nothing", "MODEL_NOT_FOUND")):
        wrong = client.InferInput("sl", [1], "INT64")
        wrong.set_data_from_numpy(np.array([1]))
        refused = None
        try:
            server.infer(name, [wrong])
        except InferenceServerException as error:
            refused = error
        assert refused is not None
        assert wanted in refused.message()
    refused = None
    try:
        server.unload_model("iris")
    except InferenceServerException as error:
        refused = error
    assert refused is not None
    assert "UNAUTHENTICATED" in refused.status()
    control = {"authorization": f"Bearer {key}"}
    server.unload_model("iris", headers=control)
    server.load_model("iris", headers=control)
    index = server.get_model_repository_index()
    assert {(one.name, one.version): one.state for one in index.models}["iris", "1"] == "READY"
    came: queue.Queue[tuple[Any, Any]] = queue.Queue()
    server.start_stream(lambda result, error: came.put((result, error)))
    server.async_stream_infer("iris", inputs)
    server.async_stream_infer("nothing", inputs)
    server.async_stream_infer("iris", inputs)
    for wanted_error in (False, True, False):
        result, failed = came.get(timeout=30)
        assert (failed is not None) == wanted_error
        assert wanted_error or result.as_numpy("predictions").tolist() == WANTED
    server.stop_stream()


async def kserve_grpc(address: str, key: str) -> None:
    from kserve import InferenceGRPCClient, InferInput, InferRequest

    client = InferenceGRPCClient(address)
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("iris")
    for raw in (True, False):
        inputs = []
        for name, column in zip(NAMES, ROWS.T, strict=True):
            inputs.append(InferInput(name, [2], "FP64"))
            inputs[-1].set_data_from_numpy(np.ascontiguousarray(column), binary_data=raw)
        answer = await client.infer(InferRequest("iris", inputs))
        assert list(answer.outputs[0].as_numpy()) == WANTED
    await client.close()


def sagemaker(url: str, key: str) -> None:
    import boto3

    secret: dict[str, Any] = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
    runtime = boto3.client("sagemaker-runtime", endpoint_url=url, region_name="eu-west-1", **secret)
    body = json.dumps({"instances": ROWS.tolist()})
    answer = runtime.invoke_endpoint(EndpointName="iris", Body=body, ContentType="application/json")
    assert json.loads(answer["Body"].read())["predictions"] == WANTED


def mlserver(url: str, address: str) -> None:
    """MLServer's codecs make the requests, and read the answers."""
    import datetime
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    import grpc
    import pandas as pd
    from mlserver.codecs import Base64Codec, DatetimeCodec, NumpyRequestCodec, PandasCodec, StringRequestCodec
    from mlserver.grpc import converters, dataplane_pb2_grpc
    from mlserver.types import InferenceRequest, InferenceResponse, MetadataModelResponse

    def get(path: str) -> bytes:
        with urlopen(url + path) as answer:
            return bytes(answer.read())

    def infer(model: str, asked: InferenceRequest) -> InferenceResponse:
        body = asked.model_dump_json(exclude_none=True).encode()
        with urlopen(Request(f"{url}/v2/models/{model}/infer", body)) as answer:
            return InferenceResponse.model_validate_json(answer.read())

    channel = grpc.insecure_channel(address)
    stub = dataplane_pb2_grpc.GRPCInferenceServiceStub(channel)

    def infer_by_grpc(model: str, asked: InferenceRequest) -> InferenceResponse:
        sent = converters.ModelInferRequestConverter.from_types(asked, model_name=model, model_version="")
        return converters.ModelInferResponseConverter.to_types(stub.ModelInfer(sent))

    metadata = MetadataModelResponse.model_validate_json(get("/v2/models/iris"))
    assert [one.name for one in metadata.inputs or []] == list(NAMES)
    assert metadata.versions == ["1", "2"]
    assert json.loads(get("/v2/models/iris/versions/2/ready"))["ready"]
    frame = pd.DataFrame(ROWS, columns=list(NAMES))
    mixed = pd.DataFrame({"whole": [1, -(2**60)], "number": [0.5, 1e300], "flag": [True, False]})
    mixed["text"] = ["a", "ñ 名"]
    moment, content = datetime.datetime(2024, 1, 2, 3, 4, 5), b"\x00\xff"
    for ask in (infer, infer_by_grpc):
        for codec, payload in ((PandasCodec, frame), (NumpyRequestCodec, ROWS)):
            answer = ask("iris", codec.encode_request(payload))
            assert NumpyRequestCodec.decode_response(answer).reshape(-1).tolist() == WANTED
            assert (answer.model_name, answer.model_version) == ("iris", "1")
            assert answer.parameters is None, answer.parameters
        use_bytes = ask is infer_by_grpc
        decoded = PandasCodec.decode_response(
            ask("mixed", PandasCodec.encode_request(mixed, use_bytes=use_bytes))
        )
        for name in mixed:
            values = [one.decode() if isinstance(one, bytes) else one for one in decoded[name]]
            assert values == mixed[name].tolist(), (name, values)
        inputs = [
            Base64Codec.encode_input("content", [content], use_bytes=use_bytes),
            DatetimeCodec.encode_input("moment", [moment], use_bytes=use_bytes),
        ]
        answer = ask("others", InferenceRequest(inputs=inputs))
        assert [one.name for one in answer.outputs] == ["content", "moment"]
        assert moment.isoformat() in str(answer.outputs[1].data.root)
        assert (
            ask("texts", StringRequestCodec.encode_request(["a", "b"], use_bytes=use_bytes))
            .outputs[0]
            .shape[0]
            == 2
        )
    wrong = PandasCodec.encode_request(frame.assign(sl=["a", "b"]))
    refused = ""
    try:
        infer("iris", wrong)
    except HTTPError as error:
        refused = json.loads(error.read())["error"]
    assert "signature" in refused
    channel.close()


async def runtime(url: str, model: str, address: str) -> None:
    """A model that KServe serves: what its inputs are, says its metadata. Prints the answers."""
    import httpx
    from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
    from kserve.inference_client import RESTConfig

    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    assert await client.is_server_ready(url)
    assert await client.is_model_ready(url, model)
    async with httpx.AsyncClient() as plain:
        told = (await plain.get(f"{url}/v2/models/{model}")).raise_for_status().json()["inputs"]
    inputs = []
    for place, one in enumerate(told):
        values = ROWS if len(told) == 1 else ROWS[:, place]
        values = np.ascontiguousarray(values.astype(np.float32 if one["datatype"] == "FP32" else np.float64))
        inputs.append(InferInput(one["name"], list(values.shape), one["datatype"]))
        inputs[-1].set_data_from_numpy(values, binary_data=False)
    answer = await client.infer(url, InferRequest(model, inputs), model_name=model)
    answers = {"v2": answer.outputs[0].as_numpy().tolist()}
    caller = InferenceGRPCClient(address)
    assert await caller.is_model_ready(model)
    answer = await caller.infer(InferRequest(model, inputs))
    answers["grpc-v2"] = answer.outputs[0].as_numpy().tolist()
    await caller.close()
    sys.stdout.write(json.dumps(answers))


def main(client: str, url: str, key: str, address: str) -> None:
    if client == "runtime":
        asyncio.run(runtime(url, key, address))
        return
    if client == "tritonclient":
        triton(url, key)
        triton_grpc(address, key)
    elif client == "mlserver":
        mlserver(url, address)
    elif client == "kserve":
        asyncio.run(kserve(url, key))
        asyncio.run(kserve_grpc(address, key))
    else:
        sagemaker(url, key)
    sys.stdout.write(f"{client} answered\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
