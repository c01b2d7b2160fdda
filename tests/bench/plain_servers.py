"""The two servers that the gateway is compared with, on the same Starlette and uvicorn.

`ceiling` reads the body and answers a constant: what this HTTP stack can do at most. `by_hand` is what
people write without a gateway: parse, make a frame, call the model, answer; no checks, no batching.
Run as a program: `plain_servers.py ceiling|by_hand PORT MODEL.pkl`.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

CONSTANT = orjson.dumps({"predictions": [0], "model": {"name": "iris", "version": "1", "alias": "champion"}})


def ceiling() -> Starlette:
    async def predict(request: Request) -> Response:
        await request.body()
        return Response(CONSTANT, media_type="application/json")

    return Starlette(routes=[Route("/predict/{name}", predict, methods=["POST"])])


def by_hand(model: Any) -> Starlette:
    import pandas as pd

    async def predict(request: Request) -> Response:
        split = orjson.loads(await request.body())["dataframe_split"]
        frame = pd.DataFrame(split["data"], columns=split["columns"])
        answer = {"predictions": model.predict(frame)}
        return Response(
            orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json"
        )

    return Starlette(routes=[Route("/predict/{name}", predict, methods=["POST"])])


def main(kind: str, port: int, model_file: Path) -> None:
    app = ceiling() if kind == "ceiling" else by_hand(pickle.loads(model_file.read_bytes()))
    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
