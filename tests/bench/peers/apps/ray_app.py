"""The models of a directory behind Ray Serve, multiplexed: `ray_app.py PORT DIRECTORY ROOM SCRATCH`."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

APPS = str(Path(__file__).parent)


def application(directory: Path, room: int) -> Any:
    @serve.deployment(max_ongoing_requests=200, ray_actor_options={"num_cpus": 0})
    class Models:
        @serve.multiplexed(max_num_models_per_replica=room)
        async def model(self, name: str) -> Any:
            from fitted import loaded

            return loaded(directory / f"{name}.pkl")

        async def __call__(self, request: Request) -> Any:
            model = await self.model(serve.get_multiplexed_model_id())
            return {"predictions": model((await request.json())["rows"]).tolist()}

    return Models.bind()


def main(port: int, directory: Path, room: int, scratch: str) -> None:
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 << 20,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=scratch,
        runtime_env={"env_vars": {"PYTHONPATH": APPS}},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(
        application(directory, room), logging_config={"enable_access_log": False, "log_level": "WARNING"}
    )
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    while not ended.wait(1):
        pass
    serve.shutdown()
    ray.shutdown()
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
