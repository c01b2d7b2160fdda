"""The operator's settings: what they are and what they mean.

A setting is declared here, with its bounds, its default and its description. `gateway.configuration` reads
the values. Knows no part that is configured.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import platformdirs
from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from gateway import cgroup
from gateway.names import check_alias, parse_short
from gateway.policy import RolloutPolicy, laid_over
from gateway.quantities import SIZE_SCHEMA, Duration, Part, Size, listed, size


class SettingsError(ValueError):
    """The settings are wrong. `problems`: (place, what is wrong), all of them; a place is a flag, a
    variable or a file with a key."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("\n".join(f"{place}: {problem}" for place, problem in problems))
        self.problems = problems


def _memory(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, str) or "%" not in value:
        return size(value)
    return size(value, (info.context or {}).get("memory_total") or cgroup.memory_total())


def _disk(value: object, info: ValidationInfo) -> object:
    cache_dir = info.data.get("cache_dir")
    if not isinstance(value, str) or "%" not in value or cache_dir is None:
        return size(value)
    there = next(path for path in (cache_dir, *cache_dir.parents) if path.exists())
    return size(value, shutil.disk_usage(there).total)


Memory = Annotated[int, BeforeValidator(_memory), Field(gt=0), SIZE_SCHEMA]
Isolation = Literal["auto", "process", "inline"]
Enforcement = Literal["strict", "warn", "mlflow"]

_POLICIES: Final = ("auto", "same", "own")


class NamedEnvironment(Part):
    """An environment that the operator made."""

    python: Path
    """Its interpreter."""


def _minors(value: object) -> object:
    for name in value if isinstance(value, dict) else ():
        if not re.fullmatch(r"3\.\d{1,2}", str(name)):
            raise ValueError(f'{name} is no minor version of Python; write for example "3.9"')
    return value


class Environments(Part):
    """How models get environments of their own."""

    build: Literal["auto", "never"] = "auto"
    """Whether environments are built here when a model needs one."""
    wheels_only: bool = True
    """Install wheels alone: nothing is compiled, and no code of a package runs during a build."""
    as_of: Literal["created", "now"] = "created"
    """Versions that a package leaves open are those of the day it was created, or of now."""
    fallback: Literal["served", "same", "refuse"] = "served"
    """What runs in this interpreter without its own environment: what served before, all, or none."""
    python: Annotated[dict[str, Path], BeforeValidator(_minors)] = {}
    """Interpreters by minor version: `{"3.9": /opt/python3.9/bin/python}`."""
    named: dict[str, NamedEnvironment] = {}
    """Environments that you made: `{NAME: {python: PATH}}`."""
    allowed: Annotated[list[str], BeforeValidator(listed)] = []
    """The locks that may be built where `unsafe_formats` is not `allow`."""

    @field_validator("named")
    @classmethod
    def _names(cls, value: dict[str, NamedEnvironment]) -> dict[str, NamedEnvironment]:
        taken = sorted(value.keys() & set(_POLICIES))
        if taken:
            raise ValueError(f"{taken[0]} is a policy; give the environment another name")
        return value


class Batch(Part):
    """Whether requests may share a call of the model, and how many rows a call has at most."""

    enabled: bool = True
    """Whether requests that wait for the same model may share one call of it."""
    max_rows: Annotated[int, Field(ge=1)] = 1024
    """Rows of one call at most."""


def _batch(value: object) -> object:
    return {"enabled": value} if isinstance(value, bool | str) else value


class ModelSettings(Part):
    """The settings of one model, or of all whose names match a pattern. None: as the gateway's own
    setting of that name says, or no limit."""

    isolation: Isolation | None = None
    """Where the model runs: as the gateway's `isolation` where not set."""
    pack: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    """Models with the same text here share a process, whatever their files execute: they trust each other."""
    processes: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = 1
    """Model processes that answer at the same time; `auto`: as many as there are processors."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Threads of the framework in each process. Not set: the container's processors."""
    timeout: Duration | None = None
    """A call that takes longer ends the model process, and the request gets 504. Not set: no limit."""
    load_timeout: Duration = 600.0
    """A load that takes longer fails."""
    memory: Memory | None = None
    """The model is ended above this. Not set: only `memory_limit` holds."""
    disk: Size | None = None
    """Temporary files of a process: it is ended above this. Not set: 4 GiB, at most a quarter of the disk."""
    pin: bool = False
    """Loaded at start and never evicted."""
    idle_ttl: Duration | None = None
    """Unloaded after so long without a request. Not set: never for that reason."""
    batch: Annotated[Batch, BeforeValidator(_batch)] = Batch()
    """Whether requests share a call: true, false, or `{enabled, max_rows}`."""
    # `model_config` is pydantic's own word, so the field has another name here.
    config: dict[str, Any] = Field(default_factory=dict, alias="model_config")
    """Passed to the model's loader, merged over the package's own `model_config`."""
    environment: str | None = None
    """Which Python the model runs in. Not set: as the gateway's `environment`."""
    env: Annotated[list[str], BeforeValidator(listed)] = []
    """Environment variables that the model process may see, by name, besides a short list."""
    network: bool = True
    """Whether the model process may use the network."""
    readable: Annotated[list[str], BeforeValidator(listed)] = []
    """Paths that the model process may read, besides its package and its Python."""
    rollout: RolloutPolicy | None = None
    """How aliases of the model move. Not set: as the gateway's `rollout`."""
    enforcement: Enforcement | None = None
    """How inputs are checked against the signature. Not set: as the gateway's `enforcement`."""
    positional: bool = False
    """Whether rows without column names (`{"instances": [[…]]}`) are taken by position on every route."""
    check_output: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of answers, 0 to 1, that are compared with the output schema."""
    warm_up: bool = True
    """Whether the saved example is asked at the load. False: a version serves unproved."""


class Settings(Part):
    """All settings, with their defaults. Durations are seconds, sizes bytes."""

    host: str = "127.0.0.1"
    """The address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """The port to listen on; 0: a free one."""
    grpc_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """The port of the V2 protocol over gRPC; 0: a free one. Not set: none. Needs the extra `grpc`."""
    registry: str | None = None
    """A registry file (.yaml, .yml, .json), its URL, or an MLflow server."""
    cache_dir: Path = Field(default_factory=lambda: Path(platformdirs.user_cache_dir("model-gateway")))
    """Where verified model files are kept."""
    state_dir: Path = Field(default_factory=lambda: Path(platformdirs.user_state_dir("model-gateway")))
    """What survives a restart: history, measurements, the control key."""
    poll_interval: Annotated[Duration, Field(gt=0)] | None = None
    """How often the registry is read. Not set: 1 s for a file, 5 s otherwise."""
    default_alias: Annotated[list[str], BeforeValidator(listed), Field(min_length=1)] = ["champion"]
    """What a bare NAME means; of several, the first that the model has."""
    default_model: str | None = None
    """The model of /invocations and of requests that name none."""
    preload: Annotated[list[str], BeforeValidator(listed)] = []
    """References that must be loaded before /readyz says yes."""
    enforcement: Enforcement | None = None
    """How inputs are checked: `strict`, `warn`, or `mlflow` for MLflow's lenient casts. Not set: `mlflow` on
    /invocations and /endpoints/NAME/invocations, `strict` on all other routes."""
    unsafe_formats: Literal["allow", "allowlist", "refuse"] = "allow"
    """Formats that run code when they load: allowed, refused, or as `unsafe_allowlist` says."""
    unsafe_allowlist: Annotated[list[str], BeforeValidator(listed)] = []
    """Names of models that may load from unsafe formats with `unsafe_formats: allowlist`."""
    accepted_formats: Annotated[list[str], BeforeValidator(listed)] = []
    """What loads although `unsafe_formats` refuses code: `pt2`, or `skops:` with the pattern of a type."""
    require_signature: bool = False
    """Refuse versions without a signature."""
    require_digest: bool = False
    """Refuse versions without a digest, before anything is fetched."""
    isolation: Isolation = "auto"
    """Where models run: outside the gateway's process, small harmless ones together (`auto`), each in its own
    process (`process`), or in the gateway's (`inline`)."""
    pack_bytes: Size = 32 * 1024**2
    """A model whose files, or whose memory, take more does not share a process under `isolation: auto`."""
    start: Literal["fork", "spawn"] = "fork"
    """How model processes begin: as a copy of one that has the frameworks imported (`fork`), or each anew."""
    model_user: Literal["auto", "same"] | Annotated[int, Field(ge=1)] = "auto"
    """The user of model processes where the gateway is root: one each (`auto`), its own, or a number."""
    memory_limit: Memory = Field(default="70%", validate_default=True)
    """Memory for models. A share means that of the container or the machine."""
    disk_limit: Annotated[int, BeforeValidator(_disk), Field(gt=0), SIZE_SCHEMA] = 20 * 1000**3
    """Size of `cache_dir` at most."""
    eviction: Literal["gdsf", "lru"] = "gdsf"
    """Which idle model leaves: by requests, load time and size (`gdsf`), or the oldest (`lru`)."""
    max_concurrent_loads: Annotated[int, Field(ge=1)] = 2
    """Models that load at the same time."""
    cold_wait: Duration = 30.0
    """How long a request waits for its model to load before it gets 503."""
    max_body_bytes: Size = 32 * 1024**2
    """Size of one request, as sent and unpacked."""
    max_inflight_bytes: Size = 256 * 1024**2
    """Size of all requests in work, as sent and as parsed. A large body, which is parsed in a process of its
    own, may take more where memory has room."""
    max_answer_bytes: Size = 256 * 1024**2
    """Size of one answer."""
    max_queue: Annotated[int, Field(ge=1)] = 1000
    """Requests that wait for one model; more get 429."""
    max_connections: Annotated[int, Field(ge=1)] | None = None
    """Connections at most. Not set: what the limit of open files allows."""
    drain_delay: Duration = 0.0
    """After SIGTERM: how long requests are still accepted."""
    drain_timeout: Duration = 30.0
    """After `drain_delay`: how long requests in flight may take."""
    keep_alive: Annotated[Duration, Field(gt=0)] = 75.0
    """An idle connection is closed after this."""
    send_timeout: Annotated[Duration, Field(gt=0)] = 60.0
    """A connection ends when its client takes nothing of an answer for this long."""
    max_connection_age: Annotated[Duration, Field(gt=0)] | None = None
    """A connection older than this ends after its next answer. Not set: never."""
    admin_key_file: Path | None = None
    """The key for control calls. Not set: the gateway writes one to `state_dir`."""
    webhook_secret_file: Path | None = None
    """The secret of MLflow's webhooks. Not set: webhooks are refused."""
    artifact_sources: Annotated[list[str], BeforeValidator(listed)] = []
    """What sources must begin with. None: a remote registry may not name places on this machine."""
    mlflow_stages: bool = False
    """MLflow's stages answer as aliases: NAME@Production."""
    mlflow_tags: bool = True
    """Digests of first fetches are written back to MLflow as tags."""
    mlflow_status: bool = False
    """Refusals are written back to MLflow as tags."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """`auto`: text on a terminal, JSON lines elsewhere."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe lines that are logged."""
    access_log: bool = False
    """A line for each request."""
    rollout: RolloutPolicy = RolloutPolicy()
    """How aliases move."""
    environment: str = "auto"
    """Which Python models run in: this one if it fits, else their own (`auto`); `same`, `own` or a NAME."""
    environments: Environments = Environments()
    """What is built for models that this interpreter does not fit, and from what."""
    models: dict[str, ModelSettings] = {}
    """Settings by model name or pattern, such as `fraud-*`."""

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)
    _foreign: list[str] = PrivateAttr(default_factory=list)

    @field_validator("default_alias")
    @classmethod
    def _aliases(cls, value: list[str]) -> list[str]:
        for alias in value:
            check_alias(alias)
        return value

    @field_validator("default_model", "preload")
    @classmethod
    def _references(cls, value: str | list[str] | None) -> str | list[str] | None:
        for text in [value] if isinstance(value, str) else value or []:
            # `preload` also takes patterns: `*`, `fraud-*`, `@champion`.
            parse_short(f"x{text}" if text.startswith("@") else text)
        return value

    @field_validator("cache_dir", "state_dir", "admin_key_file", "webhook_secret_file")
    @classmethod
    def _paths(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @model_validator(mode="after")
    def _environments(self) -> Self:
        known = [*_POLICIES, *self.environments.named]
        given = {"environment": self.environment}
        given |= {
            f"models.{name}.environment": part.environment or "auto" for name, part in self.models.items()
        }
        for place, value in given.items():
            if value not in known:
                raise ValueError(f"{place}: {value!r} is no environment; known: {', '.join(known)}")
        return self

    def for_model(self, name: str) -> ModelSettings:
        """What holds for one model; its `isolation`, `environment` and `rollout` are never None.

        Entries whose pattern matches are merged in the order they are written, later over earlier, and the
        entry with exactly this name over all of them.
        """
        entries = [(key, part) for key, part in self.models.items() if key == name or fnmatchcase(name, key)]
        entries.sort(key=lambda entry: entry[0] == name)
        merged: dict[str, Any] = {
            **ModelSettings().__dict__,
            **{name: getattr(self, name) for name in ("isolation", "enforcement", "rollout", "environment")},
        }
        for _, part in entries:
            for field in part.model_fields_set:
                value = getattr(part, field)
                if value is None:
                    continue
                if field == "config":
                    value = {**merged[field], **value}
                elif field == "rollout":
                    value = RolloutPolicy.model_validate(laid_over(merged[field].written(), value.written()))
                merged[field] = value
        return ModelSettings.model_construct(**merged)

    def read_from(self, sources: Mapping[str, str], foreign: Sequence[str]) -> Self:
        """These settings, with where each value came from, and the variables that name no setting."""
        self._sources.update(sources)
        self._foreign.extend(foreign)
        return self

    def foreign_variables(self) -> list[str]:
        """Variables with our prefix that name no setting, and none almost: other software uses the prefix."""
        return list(self._foreign)

    def sources(self) -> dict[str, str]:
        """Where each value came from, by its dotted name: `flag --port`, `GATEWAY_PORT`, a file's path or
        `default`."""
        return {**dict.fromkeys(type(self).model_fields, "default"), **self._sources}


def schema() -> dict[str, Any]:
    """The JSON schema of `gateway.yaml`."""
    return Settings.model_json_schema(by_alias=True)
