"""A model behind LitServe: `litserve_app.py PORT MODEL BATCH`; BATCH is how many requests it may merge."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import litserve
from fitted import loaded


class Model(litserve.LitAPI):
    def __init__(self, file: Path, most: int) -> None:
        waits = {"max_batch_size": most, "batch_timeout": 0.002} if most > 1 else {}
        super().__init__(**waits)
        self.file = file
        self.merges = most > 1

    def setup(self, device: str) -> None:
        self.rows = loaded(self.file)

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe takes a type as a form
        return request["rows"][0]

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, x: Any) -> Any:
        return self.rows(x if self.merges else [x])

    def unbatch(self, output: Any) -> list[Any]:
        return [output[i : i + 1] for i in range(len(output))]

    def encode_response(self, output: Any) -> Any:
        return {"predictions": output.tolist()}


if __name__ == "__main__":
    port, file, most = sys.argv[1:]
    server = litserve.LitServer(Model(Path(file), int(most)), accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1", port=int(port), log_level="warning", access_log=False, generate_client_file=False
    )
