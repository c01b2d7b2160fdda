"""The operator's settings: each is declared here with its bounds, its default and its description.

`gateway.configuration` reads the values. Must not know the parts that are configured.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
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
from gateway.credentials import AccessSettings, Limit, address, named_address
from gateway.names import check_alias, parse_short
from gateway.quantities import SIZE_SCHEMA, Duration, Part, Size, listed, size
from gateway.rollout_settings import Capture, CaptureSetting, Notify, RolloutPolicy, laid_over


@lru_cache(maxsize=1)
def _defaults() -> Mapping[str, Any]:
    return ModelSettings().__dict__


class SettingsError(ValueError):
    """The settings are not valid. `problems`: (place, what is wrong), all of them. A place is a flag, a
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

#: For so many models the merged settings are kept.
_MODELS_KEPT: Final = 20_000
_POLICIES: Final = ("auto", "same", "own")


class NamedEnvironment(Part):
    """An environment that the operator made."""

    python: Path
    """Its interpreter."""


def _minors(value: object) -> object:
    for name in value if isinstance(value, dict) else ():
        if not re.fullmatch(r"3\.\d{1,2}", str(name)):
            raise ValueError(f'{name} is not a minor version of Python; write it like "3.9"')
    return value


class Environments(Part):
    """How the gateway builds and chooses the environments of models."""

    build: Literal["auto", "never"] = "auto"
    """auto: builds an environment when a model needs one. never: uses what is built already."""
    wheels_only: bool = True
    """Install only wheels: nothing is compiled, and no code of a package runs during a build."""
    as_of: Literal["created", "now"] = "created"
    """The day of the versions that a package leaves open: the day of its creation, or now."""
    fallback: Literal["served", "same", "refuse"] = "served"
    """Which versions may run in this interpreter without their own environment: those served before, all, or
    none."""
    python: Annotated[dict[str, Path], BeforeValidator(_minors)] = {}
    """Interpreters by minor version: `{"3.9": /opt/python3.9/bin/python}`."""
    named: dict[str, NamedEnvironment] = {}
    """Environments that you made: `{NAME: {python: PATH}}`."""
    allowed: Annotated[list[str], BeforeValidator(listed)] = []
    """The locks that may be built if `unsafe_formats` is not `allow`."""

    @field_validator("named")
    @classmethod
    def _names(cls, value: dict[str, NamedEnvironment]) -> dict[str, NamedEnvironment]:
        taken = sorted(value.keys() & set(_POLICIES))
        if taken:
            raise ValueError(f"{taken[0]} is a policy; give the environment another name")
        return value


class Batch(Part):
    """Whether requests may share a call of the model, and the most rows in a call."""

    enabled: bool = True
    """Lets requests that wait for the same model share one call."""
    max_rows: Annotated[int, Field(ge=1)] = 1024
    """The most rows in one call."""


def _batch(value: object) -> object:
    return {"enabled": value} if isinstance(value, bool | str) else value


class ModelSettings(Part):
    """The settings of one model, or of all models whose names match a pattern. None: the gateway's setting of
    the same name, or no limit."""

    isolation: Isolation | None = None
    """Where the model runs. Not set: the gateway's `isolation`."""
    pack: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    """Models with the same text here share a process, whatever their files execute: they must trust each
    other.
    """
    processes: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = 1
    """The model processes that answer at the same time; `auto`: one per processor."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """The framework's threads in each process. Not set: the container's processors."""
    timeout: Duration | None = None
    """A call that takes longer ends the model process, and the request gets 504. Not set: no limit."""
    load_timeout: Duration = 600.0
    """A load that takes longer fails."""
    memory: Memory | None = None
    """A model that takes more memory is ended. Not set: only `memory_limit` applies."""
    disk: Size | None = None
    """A process with more temporary files is ended. Not set: 4 GiB, at most a quarter of the disk."""
    pin: bool = False
    """Loads the model at start and never evicts it."""
    idle_ttl: Duration | None = None
    """The model is unloaded after this time without a request. Not set: never for that reason."""
    batch: Annotated[Batch, BeforeValidator(_batch)] = Batch()
    """Lets requests share a call: true, false, or `{enabled, max_rows}`."""
    # pydantic reserves the name `model_config`, so the field has another name here.
    config: dict[str, Any] = Field(default_factory=dict, alias="model_config")
    """The configuration for the model's loader; it overrides the package's own `model_config`."""
    environment: str | None = None
    """The Python in which the model runs. Not set: the gateway's `environment`."""
    env: Annotated[list[str], BeforeValidator(listed)] = []
    """The names of environment variables that the model process may see, in addition to a short list."""
    network: bool = True
    """Lets the model process use the network."""
    readable: Annotated[list[str], BeforeValidator(listed)] = []
    """Paths that the model process may read, in addition to its package and its Python."""
    rollout: RolloutPolicy | None = None
    """How aliases of the model move. Not set: the gateway's `rollout`."""
    capture: CaptureSetting | None = None
    """Which requests are kept for replay. Keys that are not set are those of the gateway's `capture`."""
    enforcement: Enforcement | None = None
    """How inputs are checked against the signature. Not set: the gateway's `enforcement`."""
    positional: bool = False
    """Whether rows without column names (`{"instances": [[…]]}`) are read by position on every route."""
    check_output: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of answers, 0 to 1, that is compared with the output schema."""
    warm_up: bool = True
    """Whether a version answers its saved example before it serves. False: it serves without this check."""


class Settings(Part):
    """All settings, with their defaults. Durations are in seconds, sizes in bytes."""

    host: str = "127.0.0.1"
    """The address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """The port to listen on; 0: a free one."""
    grpc_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """The port of the V2 protocol over gRPC; 0: a free one. Not set: none. Needs the extra `grpc`."""
    registry: str | None = None
    """A registry file (.yaml, .yml, .json), its URL, or an MLflow server."""
    cache_dir: Path = Field(default_factory=lambda: Path(platformdirs.user_cache_dir("model-gateway")))
    """The directory for verified model files."""
    state_dir: Path = Field(default_factory=lambda: Path(platformdirs.user_state_dir("model-gateway")))
    """The directory for the state that survives a restart: history, measurements, the control key."""
    poll_interval: Annotated[Duration, Field(gt=0)] | None = None
    """How often the registry is read. Not set: 1 s for a file, 5 s otherwise."""
    default_alias: Annotated[list[str], BeforeValidator(listed), Field(min_length=1)] = ["champion"]
    """The alias of a bare NAME; with several, the first one that the model has."""
    default_model: str | None = None
    """The model of /invocations, and of requests that name no model."""
    preload: Annotated[list[str], BeforeValidator(listed)] = []
    """References, or patterns of them, that must be loaded before the gateway is ready."""
    enforcement: Enforcement | None = None
    """How inputs are checked: `strict`, `warn`, or `mlflow` for MLflow's lenient casts. Not set: `mlflow` on
    /invocations and /endpoints/NAME/invocations, `strict` on all other routes."""
    unsafe_formats: Literal["allow", "allowlist", "refuse"] = "allow"
    """Whether formats that execute code when they load are allowed, refused, or allowed for
    `unsafe_allowlist`."""
    unsafe_allowlist: Annotated[list[str], BeforeValidator(listed)] = []
    """Names of models that may load from unsafe formats with `unsafe_formats: allowlist`."""
    accepted_formats: Annotated[list[str], BeforeValidator(listed)] = []
    """Formats that load although `unsafe_formats` refuses code: `pt2`, or `skops:` with the pattern of a
    type."""
    require_signature: bool = False
    """Refuse versions without a signature."""
    require_digest: bool = False
    """Refuse versions without a digest, before anything is fetched."""
    isolation: Isolation = "auto"
    """Where models run: outside the gateway's process, small harmless ones together (`auto`), each in its own
    process (`process`), or in the gateway's process (`inline`)."""
    pack_bytes: Size = 32 * 1024**2
    """A model with larger files or more memory does not share a process under `isolation: auto`."""
    start: Literal["fork", "spawn"] = "fork"
    """How model processes start: as a fork of a process that has imported the frameworks (`fork`), or each as
    a new process (`spawn`)."""
    model_user: Literal["auto", "same"] | Annotated[int, Field(ge=1)] = "auto"
    """The user of model processes if the gateway is root: one user each (`auto`), the gateway's user
    (`same`), or a number."""
    memory_limit: Memory = Field(default="70%", validate_default=True)
    """The memory for models and for the processes that they share or are forked from. A percentage is
    relative to the container's or machine's memory."""
    disk_limit: Annotated[int, BeforeValidator(_disk), Field(gt=0), SIZE_SCHEMA] = 20 * 1000**3
    """The largest size of `cache_dir`."""
    eviction: Literal["gdsf", "lru"] = "gdsf"
    """Which idle model is evicted: by requests, load time and size (`gdsf`), or the least recently used
    (`lru`)."""
    max_concurrent_loads: Annotated[int, Field(ge=1)] = 2
    """The most models that load at the same time."""
    cold_wait: Duration = 30.0
    """How long a request waits for its model to load before it gets 503."""
    max_body_bytes: Size = 32 * 1024**2
    """The largest request body, as sent and unpacked."""
    max_inflight_bytes: Size = 256 * 1024**2
    """The memory of all request bodies in progress, as sent and as parsed. A large body, which a separate
    process parses, may take more if memory is free."""
    max_answer_bytes: Size = 256 * 1024**2
    """The largest answer."""
    max_queue: Annotated[int, Field(ge=1)] = 1000
    """The most requests that wait for one model; more get 429."""
    max_connections: Annotated[int, Field(ge=1)] | None = None
    """The most connections. Not set: as many as the limit on open files allows."""
    drain_delay: Duration = 0.0
    """After SIGTERM: how long requests are still accepted."""
    drain_timeout: Duration = 30.0
    """After `drain_delay`: how long requests in flight may take."""
    keep_alive: Annotated[Duration, Field(gt=0)] = 75.0
    """An idle connection is closed after this time."""
    send_timeout: Annotated[Duration, Field(gt=0)] = 60.0
    """A connection ends if its client reads nothing of an answer for this time."""
    max_connection_age: Annotated[Duration, Field(gt=0)] | None = None
    """A connection older than this ends after its next answer. Not set: never."""
    admin_key_file: Path | None = None
    """The file with the key for control calls. Not set: the gateway writes a key to `state_dir`."""
    access: AccessSettings = AccessSettings()
    """Decides who may call: tokens, JWTs, and callers without either."""
    limits: dict[str, Limit] = {}
    """Limits by TEAM or `token:NAME`. They need credentials (`access`)."""
    console: bool = True
    """Whether the gateway has pages at `/` and below `/console`, where people see what it holds."""
    admin_listen: str | None = None
    """HOST:PORT of a listener for control calls, the console, /metrics, /usage, /events and /registry.yaml.
    Port 0: a free one. Not set: they are with all other routes."""
    peers: str | None = None
    """The other gateways: a DNS name with all their addresses, or NAME:PORT. Without a port it is that of
    `admin_listen`, else `port`. Needs `peers_key_file`."""
    peers_key_file: Path | None = None
    """The file with the secret that the peers share, 16 characters or more. Two lines while it is changed:
    the first one signs, both are accepted."""
    webhook_secret_file: Path | None = None
    """The file with the secret of MLflow's webhooks. Not set: webhooks are refused."""
    artifact_sources: Annotated[list[str], BeforeValidator(listed)] = []
    """The allowed beginnings of sources. None: any, but a remote registry may not name places on this
    machine."""
    mlflow_stages: bool = False
    """Lets MLflow's stages answer as aliases: NAME@Production."""
    mlflow_tags: bool = True
    """Whether the digests of first downloads are written back to MLflow as tags."""
    mlflow_status: bool = False
    """Writes refusals back to MLflow as tags."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """`auto`: text on a terminal, JSON lines elsewhere."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The lowest level that is logged."""
    access_log: bool = False
    """Writes a log line for each request."""
    rollout: RolloutPolicy = RolloutPolicy()
    """How aliases move."""
    capture: CaptureSetting = Capture()
    """Which requests are kept for replay. Off by default."""
    notify: list[Notify] = []
    """URLs that get signed JSON about rollouts: `[{url, secret_file, on}]`."""
    environment: str = "auto"
    """The Python in which models run: this one if it matches, else their own (`auto`); `same`, `own` or a
    NAME."""
    environments: Environments = Environments()
    """How environments are built for models that do not match this interpreter."""
    models: dict[str, ModelSettings] = {}
    """Settings by model name or pattern, such as `fraud-*`."""

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)
    _foreign: list[str] = PrivateAttr(default_factory=list)
    _by_model: dict[str, ModelSettings] = PrivateAttr(default_factory=dict)

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

    @field_validator("notify")
    @classmethod
    def _receivers(cls, value: list[Notify]) -> list[Notify]:
        urls = [target.url for target in value]
        for url in urls:
            if urls.count(url) > 1:  # a URL may hold a secret, so the message does not
                places = [str(place) for place, other in enumerate(urls) if other == url]
                raise ValueError(f"entries {' and '.join(places)} have the same url; write it once")
        return value

    @field_validator("limits")
    @classmethod
    def _for_callers(cls, value: dict[str, Limit], info: ValidationInfo) -> dict[str, Limit]:
        access = info.data.get("access")
        if value and access is not None and not access.guarded:
            raise ValueError("they need credentials: set access.tokens_file or access.jwt")
        return value

    @field_validator("admin_listen")
    @classmethod
    def _listens(cls, value: str | None, info: ValidationInfo) -> str | None:
        port = None if value is None else address(value)[1]
        if port and port in (info.data.get("port"), info.data.get("grpc_port")):
            raise ValueError(f"port {port} is taken by another listener of the gateway")
        return value

    @field_validator("cache_dir", "state_dir", "admin_key_file", "peers_key_file", "webhook_secret_file")
    @classmethod
    def _paths(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @field_validator("peers")
    @classmethod
    def _named(cls, value: str | None) -> str | None:
        if value is not None:
            named_address(value)
        return value

    @model_validator(mode="after")
    def _with_peers(self) -> Self:
        if (self.peers is None) != (self.peers_key_file is None):
            missing, given = ("peers_key_file", "peers") if self.peers else ("peers", "peers_key_file")
            raise ValueError(f"{given} needs {missing}: set both or neither")
        if self.peers is not None and not self.peers_place[1]:
            raise ValueError(f"peers: name the port, such as {self.peers}:8080: this gateway's is not fixed")
        return self

    @property
    def peers_place(self) -> tuple[str, int]:
        """The name of the peers, and the port where they listen for each other."""
        host, port = named_address(self.peers or "")
        listens = self.port if self.admin_listen is None else address(self.admin_listen)[1]
        return host, listens if port is None else port

    @model_validator(mode="after")
    def _environments(self) -> Self:
        known = [*_POLICIES, *self.environments.named]
        given = {"environment": self.environment}
        given |= {
            f"models.{name}.environment": part.environment or "auto" for name, part in self.models.items()
        }
        for place, value in given.items():
            if value not in known:
                raise ValueError(f"{place}: {value!r} is not an environment; known: {', '.join(known)}")
        return self

    def for_model(self, name: str) -> ModelSettings:
        """The settings for one model; its `isolation`, `environment`, `rollout` and `capture` are never
        None.

        Merges the entries whose pattern matches in their written order: a later one overrides an earlier one,
        and the entry with exactly this name overrides all.
        """
        found = self._by_model.get(name)
        if found is None:
            if len(self._by_model) >= _MODELS_KEPT:
                self._by_model.clear()
            found = self._by_model[name] = self._merged(name)
        return found

    def _merged(self, name: str) -> ModelSettings:
        entries = [(key, part) for key, part in self.models.items() if key == name or fnmatchcase(name, key)]
        entries.sort(key=lambda entry: entry[0] == name)
        merged: dict[str, Any] = {
            **_defaults(),
            **{
                name: getattr(self, name)
                for name in ("isolation", "enforcement", "rollout", "environment", "capture")
            },
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
                elif field == "capture":
                    value = merged[field].with_own(value)
                merged[field] = value
        return ModelSettings.model_construct(**merged)

    def capture_of(self, name: str) -> Capture:
        """Which requests of a model are kept."""
        return self.for_model(name).capture or self.capture

    def captures(self, name: str) -> bool:
        """Returns True if requests of a model are kept."""
        return self.capture_of(name).share > 0

    def read_from(self, sources: Mapping[str, str], foreign: Sequence[str]) -> Self:
        """These settings with the source of each value, and the variables that name no setting."""
        self._sources.update(sources)
        self._foreign.extend(foreign)
        return self

    def foreign_variables(self) -> list[str]:
        """The variables with our prefix that neither name a setting nor resemble one: other software uses the
        prefix too."""
        return list(self._foreign)

    def sources(self) -> dict[str, str]:
        """The source of each value by its dotted name: `flag --port`, `GATEWAY_PORT`, a file's path or
        `default`."""
        return {**dict.fromkeys(type(self).model_fields, "default"), **self._sources}


def schema() -> dict[str, Any]:
    """The JSON schema of `gateway.yaml`."""
    return Settings.model_json_schema(by_alias=True)
