"""OpenAPI 3.1 of the gateway's own routes. What each model takes is in a document of its own.

One table of routes; a test holds it to the routes there are. Pure: knows the contract's paths and codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from gateway import __version__
from gateway.http import captures, schemas
from gateway.http.documents import openapi
from gateway.http.documents.openapi import PREDICTION
from gateway.http.documents.shapes import Schema
from gateway.views.paging import MOST

_ANSWERS: Final = {"200": "The answer."}
_READINESS: Final = {"200": "Yes.", "503": "No."}
_MOVED: Final = {"200": "Done.", "202": "Under way."}
_PROMOTED: Final = {
    "200": "With `wait`: the version serves here. `phase` is `serving (watching)` while it is watched.",
    "202": "Under way, or its first step has begun: `/rollouts/NAME@ALIAS` shows how it ends.",
}
_JSON: Final = "application/json"
_HTML: Final = ("text/html",)
_TEXT: Final = ("text/plain",)
_FRAMES: Final = (captures.LINES, captures.FRAMES)
#: Routes that never need a credential.
_OPEN: Final = frozenset(
    {"/livez", "/readyz", "/ping", "/health", "/version", "/v2", "/v2/health/live", "/v2/health/ready"}
    | {"/openapi.json", "/console/sign-in"}
)
_PAGE: Final[Mapping[str, Schema]] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": MOST},
    "after": {"type": "string"},
    "q": {"type": "string"},
}
_CAPTURES: Final[Mapping[str, Schema]] = {"form": {"enum": ["lines", "frames"]}}
_LAST: Final[Mapping[str, Schema]] = {**_CAPTURES, "last": {"type": "integer", "minimum": 1}}


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path. `body`: the schema of its JSON body, None where it takes none; `flags`: what
    its query may switch; `query`: other parameters of its query; `control`: it needs control access; `media`:
    the content types of its answer. The errors of a page are pages, too."""

    method: str
    path: str
    summary: str
    errors: Sequence[str] = ()
    answers: dict[str, str] | None = None
    body: Schema | None = None
    flags: Sequence[str] = ()
    query: Mapping[str, Schema] = field(default_factory=dict)
    control: bool = False
    media: Sequence[str] = (_JSON,)


def _ask(path: str, summary: str, body: Schema | None = None) -> Route:
    return Route("post", path, summary, PREDICTION, body=body or openapi.body(None))


def _verb(path: str, summary: str, flags: Sequence[str] = (), method: str = "post") -> Route:
    errors = ("400", "404", "409", "422", "503")
    return Route(method, path, summary, errors, _MOVED, {}, flags, control=True)


def _fields(kind: type[schemas.Body]) -> Schema:
    document = kind.model_json_schema()
    return {key: value for key, value in document.items() if key not in ("title", "description")}


def routes(console: bool = True) -> list[Route]:
    """Every route. `{model}` is NAME or NAME@ALIAS, escaped as a path is. `console`: whether there is one."""
    return [*_routes(), *(_console() if console else [])]


def _console() -> list[Route]:
    return [
        Route("get", "/", "The console: what is loaded, problems first.", media=_HTML),
        Route("get", "/console/failures", "The console: what fails, and what to do.", media=_HTML),
        Route("get", "/console/rollouts", "The console: all aliases.", media=_HTML),
        Route("get", "/console/rollouts/{model}", "The console: one alias.", ("400", "404"), media=_HTML),
        Route("get", "/console/sign-in", "The console: a form for a one-time code.", media=_HTML),
        Route("post", "/console/codes", "A one-time code for a browser.", control=True),
    ]


def _routes() -> list[Route]:
    v1 = {"type": "object", "properties": {"instances": {"type": "array"}}, "required": ["instances"]}
    v2 = openapi.v2_request(None)["schema"]
    ready = ("404", "503")
    move = ("400", "404", "409", "412", "422", "503")
    return [
        _ask("/predict/{model}", "Ask a model."),
        _ask("/predict/{model}/versions/{version}", "Ask one version of a model."),
        _ask("/predict", "Ask the model that the header X-Model or the body names, else the default model."),
        _ask("/invocations", "Ask the default model in the form of MLflow's scoring server."),
        Route("get", "/ping", "Alive, for MLflow's and SageMaker's callers.", media=_TEXT),
        Route("get", "/health", "Alive, for MLflow's callers.", media=_TEXT),
        Route("get", "/version", "The gateway's version.", media=_TEXT),
        Route("get", "/v2", "The server's metadata of the Open Inference Protocol (V2)."),
        Route("get", "/v2/health/live", "Alive."),
        Route("get", "/v2/health/ready", "Readiness for traffic.", answers=_READINESS),
        Route("get", "/v2/models/{model}", "A model's tensors.", ready),
        Route(
            *(
                "get",
                "/v2/models/{model}/ready",
                "A model's readiness; `?load=true` waits for the load.",
                ready,
            ),
            query={"load": {"enum": ["true", "false"]}},
        ),
        _ask("/v2/models/{model}/infer", "Ask a model by V2.", v2),
        _ask("/v2/models/{model}/versions/{version}/infer", "Ask one version by V2.", v2),
        Route("post", "/v2/repository/index", "All versions and their states.", ("400", "413"), body={}),
        _verb("/v2/repository/models/{model}/load", "Load a model."),
        _verb("/v2/repository/models/{model}/unload", "Unload a model."),
        Route("get", "/v1/models", "The names of all models."),
        Route("get", "/v1/models/{model}", "A model's state, as KServe says it.", ready),
        _ask("/v1/models/{model}:predict", "Ask a model by V1.", v1),
        _ask("/endpoints/{model}/invocations", "Ask a model, for mlflow.deployments and boto3."),
        Route("get", "/api/2.0/endpoints", "All models, for mlflow.deployments."),
        Route("get", "/api/2.0/endpoints/{model}", "A model, for mlflow.deployments.", ready),
        Route(
            *("get", "/models", "All models, their aliases and versions, and what is loaded.", ("422",)),
            query=_PAGE,
        ),
        Route("get", "/models/{model}", "One model.", ("400", "404")),
        Route("get", "/models/{model}/versions/{version}", "One version: state, signature.", ("400", "404")),
        Route("get", "/models/{model}/openapi.json", "The document of one model.", ready),
        Route("get", "/models/{model}/docs", "A page to try a model.", ready, media=_HTML),
        Route(
            *("put", "/models/{model}/aliases/{alias}", "Move an alias, after the gates.", move, _PROMOTED),
            body=_fields(schemas.Promotion),
            flags=("wait", "dry_run"),
            control=True,
        ),
        _verb("/models/{model}/aliases/{alias}", "Remove an alias.", method="delete"),
        Route(
            *("post", "/models/{model}/aliases/{alias}/rollback", "Move an alias back.", move, _MOVED),
            body=_fields(schemas.Rollback),
            flags=("wait",),
            control=True,
        ),
        _verb("/models/{model}/load", "Load a model.", ("wait",)),
        _verb("/models/{model}/versions/{version}/load", "Load a version.", ("wait",)),
        _verb("/models/{model}/unload", "Unload a model.", ("wait",)),
        _verb("/models/{model}/versions/{version}/unload", "Unload a version.", ("wait",)),
        Route("get", "/rollouts", "All aliases: desired, serving, last good.", ("422",), query=_PAGE),
        Route("get", "/rollouts/{model}", "One alias and its history: NAME@ALIAS.", ("400", "404")),
        _verb("/rollouts/{model}/pause", "Pause a rollout under way."),
        _verb("/rollouts/{model}/resume", "Resume a rollout that is paused."),
        _verb("/rollouts/{model}/abort", "End a rollout: the version in service stays."),
        _verb("/rollouts/{model}/finish", "Serve the new version to all callers now."),
        Route("get", "/events", "Events, server-sent.", control=True, media=("text/event-stream",)),
        Route("get", "/captures", "Captured requests, counted by model and version.", ("400",), control=True),
        _verb("/captures", "Drop all captured requests.", method="delete"),
        Route(
            *("get", "/captures/{model}", "The captured requests of a model."),
            errors=("400", "404", "422"),
            query=_CAPTURES,
            control=True,
            media=_FRAMES,
        ),
        _verb("/captures/{model}", "Drop the captured requests of a model.", method="delete"),
        Route(
            *("get", "/captures/{model}/versions/{version}", "The captured requests of a version."),
            errors=("400", "404", "422"),
            query=_LAST,
            control=True,
            media=_FRAMES,
        ),
        _verb("/captures/{model}/versions/{version}", "Drop those of a version.", method="delete"),
        _verb("/registry/refresh", "Read the registry now."),
        Route("get", "/registry.yaml", "This registry as a document.", media=("application/yaml",)),
        Route("post", "/webhooks/mlflow", "A signed hint of an MLflow server.", ("401", "403"), body={}),
        Route("get", "/livez", "The process is alive."),
        Route("get", "/readyz", "Readiness for traffic.", answers=_READINESS),
        Route("get", "/metrics", "Metrics for Prometheus.", media=_TEXT),
        Route(
            *("get", "/usage", "Usage by team and model.", ("422",)),
            query={"by": {"enum": ["team", "model", "team,model", "model,team"]}},
        ),
        Route("get", "/openapi.json", "This document."),
        Route("get", "/docs", "A page with all models and routes.", media=_HTML),
    ]


def document(console: bool = True) -> dict[str, Any]:
    """The document. Its server is where it lies, so that it holds under a path prefix."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes(console):
        words = [word.partition("}")[0] for word in route.path.split("{")[1:]]
        path = paths.setdefault(route.path, {})
        if words:
            path["parameters"] = [
                {"name": word, "in": "path", "required": True, "schema": {"type": "string"}} for word in words
            ]
        path[route.method] = _operation(route)
    about = "What a model takes is in `/models/NAME/openapi.json`."
    return {
        "openapi": "3.1.0",
        "info": {"title": "Model gateway", "version": __version__, "description": about},
        "servers": [{"url": "."}],
        "paths": paths,
        "components": openapi.components(),
    }


def _operation(route: Route) -> dict[str, Any]:
    content = {kind: {"schema": {} if kind == _JSON else {"type": "string"}} for kind in route.media}
    answers = {
        status: {"description": said, "content": content}
        for status, said in (route.answers or _ANSWERS).items()
    }
    errors = sorted({*route.errors, *(() if route.path in _OPEN else ("401", "403"))})
    failures = openapi.errors(*errors)
    if route.media == _HTML and not route.path.endswith("docs"):
        failures = {status: {**said, "content": content} for status, said in failures.items()}
    any_other = openapi.as_json("Any other failure.", {"$ref": "#/components/schemas/Error"})
    words = "".join(c if c.isalnum() else " " for c in route.path).split()
    found: dict[str, Any] = {
        "operationId": "_".join([route.method, *words]),
        "summary": route.summary,
        "responses": {**failures, **answers, "default": any_other},
    }
    if route.control:
        found["security"] = [{"key": []}]
    if route.body is not None:
        body = {"application/json": {"schema": route.body}}
        found["requestBody"] = {"required": bool(route.body.get("required")), "content": body}
    query = {**route.query, **{flag: {"type": "boolean"} for flag in route.flags}}
    if query:
        found["parameters"] = [
            {"name": name, "in": "query", "schema": schema} for name, schema in query.items()
        ]
    return found
