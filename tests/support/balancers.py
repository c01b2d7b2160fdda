"""The balancers of `deploy/routing` as processes, in front of backends of this machine.

Each runs its shipped file. Changed: the addresses, and what a process of a test needs (paths, no daemon).
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import yaml

from tests.support.containers import ROOT, tool
from tests.support.shell import free_port

ROUTING = ROOT / "deploy" / "routing"


def _nginx(place: Path, port: int, backends: Sequence[int]) -> list[str]:
    text = (ROUTING / "nginx.conf").read_text(encoding="utf-8")
    (line,) = set(re.findall(r" +server gateway-\d+:8080( [^;]*);\n", text))
    text = re.sub(r" +server gateway-\d+:8080 [^;]*;\n", "", text)
    servers = "".join(f"server 127.0.0.1:{one}{line};\n" for one in backends)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {place}/{kind};" for kind in kinds)
    text = text.replace("consistent;\n", f"consistent;\n{servers}")
    text = text.replace("listen 8000", f"listen 127.0.0.1:{port}")
    text = text.replace("http {\n", f"http {{\naccess_log off; {temporary}\n")
    # One process: what a worker learns of a backend that is away is its own.
    text = text.replace("worker_processes auto;", f"daemon off; pid {place}/pid;")
    (place / "nginx.conf").write_text(text, encoding="utf-8")
    return [tool("nginx"), "-e", str(place / "error.log"), "-c", str(place / "nginx.conf")]


def _haproxy(place: Path, port: int, backends: Sequence[int]) -> list[str]:
    text = (ROUTING / "haproxy.cfg").read_text(encoding="utf-8")
    text = re.sub(r" +server gateway-\d+ gateway-\d+:8080\n", "", text)
    text += "".join(f"    server gateway-{one} 127.0.0.1:{one} id {one}\n" for one in backends)
    text = text.replace("bind :8000", f"bind 127.0.0.1:{port}").replace("maxconn 20000", "maxconn 500")
    (place / "haproxy.cfg").write_text(text, encoding="utf-8")
    return [tool("haproxy"), "-db", "-f", str(place / "haproxy.cfg")]


def _envoy(place: Path, port: int, backends: Sequence[int]) -> list[str]:
    config = yaml.safe_load((ROUTING / "envoy.yaml").read_text(encoding="utf-8"))
    (listener,) = config["static_resources"]["listeners"]
    listener["address"]["socket_address"] |= {"address": "127.0.0.1", "port_value": port}
    (cluster,) = config["static_resources"]["clusters"]
    cluster["type"] = "STATIC"
    del cluster["dns_refresh_rate"]
    addresses = [{"address": "127.0.0.1", "port_value": one} for one in backends]
    ends = [{"endpoint": {"address": {"socket_address": one}}} for one in addresses]
    cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": ends}]
    (place / "envoy.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    quiet = ["--log-level", "error", "--concurrency", "1", "--disable-hot-restart"]
    return [tool("envoy"), "-c", str(place / "envoy.yaml"), *quiet]


BALANCERS = {"envoy": _envoy, "haproxy": _haproxy, "nginx": _nginx}


@contextmanager
def balancing(kind: str, place: Path, backends: Sequence[int]) -> Iterator[str]:
    """The URL of a balancer over these ports of this machine. Returns once it passes requests on."""
    place.mkdir(parents=True, exist_ok=True)
    port = free_port()
    with (place / "output.log").open("wb") as log:
        process = subprocess.Popen(BALANCERS[kind](place, port, backends), stdout=log, stderr=log)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                if httpx.get(f"{url}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            said = (place / "output.log").read_text(errors="replace")
            assert process.poll() is None, said
            assert time.monotonic() < end, said
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(30)
