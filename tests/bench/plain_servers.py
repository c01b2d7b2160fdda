"""The servers that the gateway is compared with, on the same Starlette and uvicorn.

`ceiling` reads the body and answers a constant: what this HTTP stack can do at most. `by_hand` is what
people write without a gateway: parse, make an array or a frame, call the model, answer; no checks, no
batching. `in_thread` is the same with the call in a thread, so that the loop stays free. `many` holds the
models of a directory in a dictionary, at most ROOM of them, and drops the one that was not used for the
longest time. Run as a program:

    plain_servers.py ceiling|by_hand|in_thread PORT MODEL.pkl|MODEL.onnx
    plain_servers.py many PORT DIRECTORY ROOM
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
import uvicorn
from peers.apps import fitted
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

CONSTANT = orjson.dumps({"predictions": [0], "model": {"name": "iris", "version": "1", "alias": "champion"}})
Predict = Callable[[Any], Any]


def served(answer: Callable[[Request], Awaitable[Response]]) -> Starlette:
    return Starlette(routes=[Route("/predict/{name}", answer, methods=["POST"])])


def ceiling() -> Starlette:
    async def predict(request: Request) -> Response:
        await request.body()
        return Response(CONSTANT, media_type="application/json")

    return served(predict)


def loaded(file: Path) -> Predict:
    """What answers a request's parsed body."""
    model = fitted.loaded(file)

    def predict(body: Any) -> Any:
        if "inputs" in body:
            return model(body["inputs"])
        split = body["dataframe_split"]
        return model(split["data"], split["columns"])

    return predict


def answer(predictions: Any) -> Response:
    content = orjson.dumps({"predictions": predictions}, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, media_type="application/json")


def by_hand(file: Path) -> Starlette:
    model = loaded(file)

    async def predict(request: Request) -> Response:
        return answer(model(orjson.loads(await request.body())))

    return served(predict)


def in_thread(file: Path) -> Starlette:
    model = loaded(file)

    async def predict(request: Request) -> Response:
        return answer(await run_in_threadpool(model, orjson.loads(await request.body())))

    return served(predict)


def many(directory: Path, room: int) -> Starlette:
    models: OrderedDict[str, Predict] = OrderedDict()

    async def predict(request: Request) -> Response:
        name = request.path_params["name"]
        if name in models:
            models.move_to_end(name)
        else:
            models[name] = loaded(directory / f"{name}.pkl")
            if len(models) > room:
                models.popitem(last=False)
        return answer(models[name](orjson.loads(await request.body())))

    return served(predict)


def main(kind: str, port: int, file: Path, room: int = 0) -> None:
    match kind:
        case "ceiling":
            app = ceiling()
        case "many":
            app = many(file, room)
        case "in_thread":
            app = in_thread(file)
        case _:
            app = by_hand(file)
    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else 0)
