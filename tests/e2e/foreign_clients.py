"""Asks a gateway with other projects' own clients. Runs in an environment of its own, with the gateway's URL
and its control key as arguments; it imports nothing of the gateway. Says which clients were used.
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


def sagemaker(url: str, key: str) -> None:
    import boto3

    secret: dict[str, Any] = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
    runtime = boto3.client("sagemaker-runtime", endpoint_url=url, region_name="eu-west-1", **secret)
    body = json.dumps({"instances": ROWS.tolist()})
    answer = runtime.invoke_endpoint(EndpointName="iris", Body=body, ContentType="application/json")
    assert json.loads(answer["Body"].read())["predictions"] == WANTED


if __name__ == "__main__":
    triton(*sys.argv[1:3])
    asyncio.run(kserve(*sys.argv[1:3]))
    sagemaker(*sys.argv[1:3])
    sys.stdout.write("tritonclient kserve boto3\n")
