"""What managed hosts say to their containers: SageMaker by the argument `serve`, Vertex AI by `AIP_*`.

Turns their variables into what `gateway serve` takes. Knows the hosts' names for things; nothing of routes.
Source: https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html and
https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from gateway.commands.terminal import Failure

if TYPE_CHECKING:
    from gateway.http.hosting import Hosting

ARGUMENT: Final = "serve"
#: Where SageMaker puts a model; its own toolkits honour the variable, too.
_BASE_VARIABLE: Final = "SAGEMAKER_BASE_DIR"
_BASE: Final = "/opt/ml"
_NAME: Final = "model"


class Asked(NamedTuple):
    """`models` as `gateway serve` takes them, settings in `flags`, and the routes that the host expects."""

    models: list[str]
    flags: dict[str, Any]
    hosting: Hosting | None


def asked(environ: Mapping[str, str], models: Sequence[str], directory: Path = Path()) -> Asked:
    """What a host asks for; `models` and nothing more where there is none. Raises Failure."""
    if list(models) == [ARGUMENT] and not (directory / ARGUMENT).exists():
        return _sagemaker(environ)
    if environ.get("AIP_HTTP_PORT"):
        return _vertex(environ, list(models))
    return Asked(list(models), {}, None)


def _sagemaker(environ: Mapping[str, str]) -> Asked:
    from gateway.http.hosting import Hosting
    from gateway.registries.hosted import HostedModels

    flags = _listening(environ, environ.get("SAGEMAKER_BIND_TO_PORT") or "8080", "SAGEMAKER_BIND_TO_PORT")
    base = Path(environ.get(_BASE_VARIABLE) or _BASE)
    if environ.get("SAGEMAKER_MULTI_MODEL", "").lower() == "true":
        return Asked([], flags, Hosting(models=HostedModels(base / "models")))
    place = base / "model"
    within = [file.parent for file in sorted(place.glob("*/MLmodel"))]
    if len(within) == 1 and not (place / "MLmodel").is_file():
        place = within[0]  # an archive of the directory itself
    return Asked([f"{_NAME}={place}"], flags, None)


def _vertex(environ: Mapping[str, str], models: list[str]) -> Asked:
    from gateway.http.hosting import Hosting

    hosting = Hosting(_path(environ, "AIP_PREDICT_ROUTE"), _path(environ, "AIP_HEALTH_ROUTE"))
    if not models and (place := environ.get("AIP_STORAGE_URI")):
        models = [f"{_NAME}={place.rstrip('/')}"]
    return Asked(models, _listening(environ, environ["AIP_HTTP_PORT"], "AIP_HTTP_PORT"), hosting)


def _path(environ: Mapping[str, str], variable: str) -> bytes | None:
    path = environ.get(variable)
    if path and not path.startswith("/"):
        raise Failure(f"{variable} is {path!r}: a path begins with /", "set it as Vertex AI does")
    return path.encode() if path else None


def _listening(environ: Mapping[str, str], port: str, variable: str) -> dict[str, Any]:
    if not (port.isascii() and port.isdigit() and 0 <= int(port) <= 65535):
        raise Failure(f"{variable} is {port!r}, which is not a port number", "set it to a number up to 65535")
    host = {} if environ.get("GATEWAY_HOST") else {"host": "0.0.0.0"}
    return {"port": int(port), **host}
