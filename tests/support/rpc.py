"""A caller of the protocol over gRPC that knows only the protocol: our messages, no client of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np

from gateway.grpc import inference_pb2 as pb

SERVICE = "/inference.GRPCInferenceService/"


class Caller:
    """Calls methods on one connection."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def method(self, name: str) -> grpc.UnaryUnaryMultiCallable:
        kind = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name[name]
        return self._channel.unary_unary(
            SERVICE + name,
            request_serializer=lambda given: given if isinstance(given, bytes) else given.SerializeToString(),
            response_deserializer=getattr(pb, kind.output_type.name).FromString,
        )

    def call(
        self, name: str, request: Any, timeout: float = 60, **metadata: str
    ) -> tuple[Any, dict[str, str]]:
        """The answer and its trailing metadata."""
        sent = [(key.replace("_", "-"), value) for key, value in metadata.items()]
        answer, call = self.method(name).with_call(request, timeout=timeout, metadata=sent)
        return answer, trailing(call)

    def infer(self, request: Any, **options: Any) -> Any:
        return self.call("ModelInfer", request, **options)[0]

    def stream(self, requests: Iterator[Any]) -> Any:
        return self._channel.stream_stream(
            SERVICE + "ModelStreamInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )(requests)


@contextmanager
def caller(address: str, **options: int) -> Iterator[Caller]:
    """A caller. `options` are channel options, with `_` for `.`."""
    chosen = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    chosen += [(name.replace("__", "."), value) for name, value in options.items()]
    with grpc.insecure_channel(address, options=chosen) as channel:
        yield Caller(channel)


def trailing(call: Any) -> dict[str, str]:
    return dict(call.trailing_metadata() or ())


FIELDS = {
    "BOOL": "bool_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def request(model: str, inputs: Mapping[str, tuple[str, Any]], *, raw: bool = True, **fields: Any) -> Any:
    """A ModelInferRequest. `inputs`: a datatype and an array by name, of BYTES one of `bytes`."""
    message = pb.ModelInferRequest(model_name=model, **fields)
    for name, (datatype, values) in inputs.items():
        array = np.asarray(values)
        one = message.inputs.add(name=name, datatype=datatype, shape=array.shape)
        if not raw:
            getattr(one.contents, FIELDS[datatype]).extend(array.reshape(-1).tolist())
        elif datatype == "BYTES":
            parts = [len(value).to_bytes(4, "little") + value for value in array.reshape(-1).tolist()]
            message.raw_input_contents.append(b"".join(parts))
        else:
            message.raw_input_contents.append(array.tobytes())
    return message


def outputs(answer: Any) -> dict[str, list[Any]]:
    """The values of an answer by output, whichever form they have."""
    found: dict[str, list[Any]] = {}
    for place, one in enumerate(answer.outputs):
        if not answer.raw_output_contents:
            found[one.name] = list(getattr(one.contents, FIELDS[one.datatype]))
            continue
        raw = answer.raw_output_contents[place]
        if one.datatype == "BYTES":
            found[one.name] = []
            while raw:
                size = int.from_bytes(raw[:4], "little")
                found[one.name].append(raw[4 : 4 + size])
                raw = raw[4 + size :]
            continue
        dtype = {"BOOL": "?", "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
        found[one.name] = np.frombuffer(raw, dtype[one.datatype]).tolist()
    return found
