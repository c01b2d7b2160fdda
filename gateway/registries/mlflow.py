"""The registry of an MLflow tracking server. Queries only the names in use.

A snapshot holds the models that were requested here. `read` queries each of them again, with one call per
model, because that call returns all its aliases. Versions are immutable, so each is queried once. MLflow does
not keep an alias's previous version, or whether a move was forced, so both are written as tags of the
registered model. Uses the REST interface through `mlflow_client`; must not know a running gateway.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import threading
import uuid
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from gateway.names import InvalidReference, Reference, check_alias, check_name, check_version
from gateway.registries import mlflow_answers as answers
from gateway.registries.base import (
    LONGEST_PAUSE,
    Alias,
    Model,
    Move,
    NotInRegistry,
    Observation,
    PreconditionFailed,
    RegistryError,
    RegistryReadOnly,
    RegistryUnavailable,
    Snapshot,
    Version,
)
from gateway.registries.mlflow_artifacts import MLflowArtifacts
from gateway.registries.mlflow_calls import Calls, Unavailable, not_mlflow, refused
from gateway.registries.mlflow_client import MLflowClient, MLflowError
from gateway.registries.resolution import find_alias, key, resolve

log = logging.getLogger("gateway.registries.mlflow")

DIGEST_TAG: Final = "gateway.digest"
ALIAS_TAG: Final = "gateway.alias."
STATUS_TAG: Final = "gateway.status."
VERDICT_TAG: Final = "gateway.verdict."
#: How many models are queried at once when all models in use are read.
AT_ONCE: Final = 4
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class _Known:
    """A model in use. `created` distinguishes a registered model from a later one of the same name (None:
    read before a restart). `order` is the number of the query."""

    model: Model
    created: int | None
    order: int


class MLflowRegistry:
    """A tracking server: `http(s)://HOST[:PORT][/PATH]` or `mlflow+http(s)://…`.

    See `Registry`. If MLFLOW_REGISTRY_URI names this server and MLFLOW_TRACKING_URI another one, runs, logged
    models and proxied files are read from the other one. `stages`: MLflow's stages work as aliases with their
    names. `tagging`: the digest of a first download is written as a tag. `digests`: versions without a digest
    are queried at every read. Raises RegistryError.
    """

    poll_interval = 5.0
    longest_pause = LONGEST_PAUSE
    writable = True
    partial = True
    lasting = True

    def __init__(
        self,
        target: str,
        *,
        create: bool = False,
        environ: Mapping[str, str] | None = None,
        stages: bool = False,
        tagging: bool = True,
        digests: bool = False,
    ) -> None:
        environ = os.environ if environ is None else environ
        tracking = environ.get("MLFLOW_TRACKING_URI", "")
        apart = target == environ.get("MLFLOW_REGISTRY_URI") and re.match(r"(mlflow\+)?https?://", tracking)
        try:
            self._calls = Calls(MLflowClient(target, environ))
            self._tracking = Calls(MLflowClient(tracking, environ)) if apart else self._calls
        except ValueError as error:
            raise RegistryError(str(error)) from error
        self.target = self._calls.base
        self.identity = f"mlflow:{self._calls.base}"
        self._artifacts = MLflowArtifacts(self._tracking, environ.get("MLFLOW_EXPERIMENT_ID") or "0")
        self._stages, self._tagging, self._needs_digests = stages, tagging, digests
        self._orders = itertools.count(1)
        self._lock = threading.Lock()
        self._names: dict[str, _Known] = {}
        self._fixed: dict[str, Model] = {}
        self._absent: dict[str, int] = {}
        #: The models that could not be read last time, with the logged reasons.
        self._told: dict[str, str] = {}
        self._life = uuid.uuid4().hex
        self._changes = 0

    def __repr__(self) -> str:
        return f"<MLflowRegistry {self.target}, {len(self._names)} models in use>"

    # Reading.

    def why_not_writable(self) -> str | None:
        return None

    def read(self) -> Snapshot:
        names = list(self._names)
        if not names:  # no model to query: check the connection and the credentials
            self._calls.read("registered-models/search", {"max_results": 1}, retries=0)
            return self.known()
        failed: dict[str, Exception] = {}
        away: Unavailable | None = None
        with ThreadPoolExecutor(min(AT_ONCE, len(names))) as pool:
            for i in range(0, len(names), AT_ONCE):
                some = names[i : i + AT_ONCE]
                for name, error in zip(some, pool.map(self._refreshed, some), strict=True):
                    if error is not None:
                        failed[name] = error
                    if isinstance(error, Unavailable) and not error.reached:
                        away = error
                if away is not None:
                    raise away
        if len(failed) == len(names):
            raise failed[names[-1]]
        self._tell(failed)
        return self.known()

    def _refreshed(self, name: str) -> Exception | None:
        try:
            self._refresh(name, retries=0)
        except Exception as error:  # noqa: BLE001 - whatever one model's answer holds, the others are read
            return error
        return None

    def _tell(self, failed: Mapping[str, Exception]) -> None:
        """Logs the models whose last known state stays; a reason that lasts, once."""
        told = {name: f"{type(error).__name__}: {error}" for name, error in failed.items()}
        for name, error in failed.items():
            if self._told.get(name) != told[name]:
                bug = None if isinstance(error, RegistryError) else error
                log.warning("keeping the last known state of %s: %s", name, told[name], exc_info=bug)
        self._told = told

    def find(self, reference: Reference) -> Snapshot:
        if reference.name:
            self._refresh(reference.name, reference.version)
        elif key(reference) not in self._fixed:
            found = self._artifacts.found(reference)
            if found is not None:
                with self._lock:
                    self._fixed[found.name] = Model(found.name, {found.version: found}, {})
                    self._changes += 1
        return self.known()

    def known(self) -> Snapshot:
        with self._lock:
            models = {name: known.model for name, known in self._names.items()} | self._fixed
            return Snapshot(models, f"{self._life}-{self._changes}")

    def resume(self, snapshot: Snapshot) -> None:
        with self._lock:
            for name, model in snapshot.models.items():
                if ":" in name:
                    self._fixed[name] = model
                else:
                    self._names[name] = _Known(model, None, 0)
            self._changes += 1

    def forget(self, names: Collection[str]) -> None:
        with self._lock:
            self._names = {name: known for name, known in self._names.items() if name not in names}
            self._fixed = {name: model for name, model in self._fixed.items() if name not in names}
            self._changes += 1

    def listing(self, name: str | None = None) -> Snapshot:
        """Lists the models; with `name`, that model with at most a thousand of its versions."""
        if name is None:
            found = self._calls.pages("registered-models/search", "registered_models", {"max_results": 100})
            return Snapshot({str(item.get("name")): self._listed(item) for item in found}, "")
        self._refresh(name)
        known = self._names.get(name)
        if known is None:
            return Snapshot({}, "")
        versions = {
            str(item.get("version")): self._version_of(name, item, str(item.get("source", "")))
            for item in self._versions(name)
        }
        # What an alias points to is in it, also where a thousand versions are newer.
        return Snapshot({name: Model(name, {**known.model.versions, **versions}, known.model.aliases)}, "")

    # One model.

    def _refresh(self, name: str, wanted: str | None = None, *, retries: int | None = None) -> None:
        """Queries a model, and those of its named versions that are not known yet."""
        order = next(self._orders)
        known = self._names.get(name)
        try:
            answer = self._calls.call("GET", "registered-models/get", {"name": name}, retries=retries)
        except MLflowError as error:
            if not error.absent:
                raise refused(error) from error
            self._keep(name, None, order)
            return
        registered = answer.get("registered_model")
        if not isinstance(registered, dict) or registered.get("name") != name:
            raise not_mlflow(self.target)
        created = answers.whole(registered.get("creation_timestamp"))
        if known is not None and known.created not in (None, created):
            known = None  # another model of the same name
        before = known.model if known is not None else Model(name, {}, {})
        versions = dict(before.versions)
        again = {n for n, version in versions.items() if self._needs_digests and version.digest is None}
        aliases = self._aliases(registered)
        latest = answers.listed_versions(registered)
        needed = {entry.version for entry in aliases.values()} | ({wanted} if wanted else set())
        # What answers while a newer version is tried, or was taken back by another gateway.
        needed |= {entry.last_good for entry in aliases.values() if entry.last_good is not None}
        if latest:
            needed.add(max(latest, key=int))
        for alias, entry in before.aliases.items():
            if alias not in aliases and self._gone(name, entry.version):
                # MLflow removes the aliases of a deleted version: no user removed this one.
                versions.pop(entry.version, None)
                aliases[alias] = entry
        for number in sorted((needed - versions.keys()) | again, key=int):
            if (version := self._version(name, number)) is not None:
                versions[number] = version
        tags = answers.tags(registered)
        for alias, entry in aliases.items():
            version = versions.get(entry.version)
            told = None if version is None else version.tags.get(VERDICT_TAG + alias)
            aliases[alias] = answers.with_verdict(entry, tags.get(ALIAS_TAG + alias), told)
        self._keep(name, _Known(Model(name, versions, aliases, answers.rollout(tags)), created, order), order)

    def _aliases(self, registered: Mapping[str, Any]) -> dict[str, Alias]:
        tags = answers.tags(registered)
        aliases: dict[str, Alias] = {}
        if self._stages:
            for number, item in answers.listed_versions(registered).items():
                stage = str(item.get("current_stage") or "None")
                if stage != "None":
                    aliases[stage] = Alias(number)
        for item in answers.objects(registered.get("aliases")):
            alias, number = str(item.get("alias")), str(item.get("version"))
            try:
                aliases[check_alias(alias)] = answers.with_past(
                    check_version(number), tags.get(ALIAS_TAG + alias)
                )
            except InvalidReference as error:
                log.warning("skipped an alias of %s: %s", registered.get("name"), error)
        return aliases

    def _gone(self, name: str, number: str) -> bool:
        """Returns whether the server reports the version as deleted."""
        try:
            self._calls.call("GET", "model-versions/get", {"name": name, "version": number})
        except MLflowError as error:
            if error.absent:
                return True
            raise refused(error) from error
        return False

    def _version(self, name: str, number: str) -> Version | None:
        """Returns a version that may be served; None if there is none (yet)."""
        values = {"name": name, "version": number}
        try:
            item = self._calls.call("GET", "model-versions/get", values).get("model_version")
            if not isinstance(item, dict) or str(item.get("version")) != number:
                raise not_mlflow(self.target)
            if item.get("status", "READY") != "READY":
                return None
            place = self._calls.call("GET", "model-versions/get-download-uri", values).get("artifact_uri")
        except MLflowError as error:
            if error.absent:
                return None
            raise refused(error) from error
        if not isinstance(place, str) or not place:
            raise not_mlflow(self.target)
        return self._version_of(name, item, self._artifacts.located(place))

    def _version_of(self, name: str, item: Mapping[str, Any], source: str) -> Version:
        tags = answers.tags(item)
        digest = tags.get(DIGEST_TAG)
        if digest is not None and not _DIGEST.match(digest):
            log.warning("the tag %s of %s/%s is not a digest", DIGEST_TAG, name, item.get("version"))
            digest = None
        created = answers.moment(item.get("creation_timestamp"))
        return Version(name, str(item.get("version")), source, digest, created, tags)

    def _keep(self, name: str, answer: _Known | None, order: int) -> None:
        """Stores an answer, unless the answer to a later query is stored already."""
        with self._lock:
            known = self._names.get(name)
            if order < max(0 if known is None else known.order, self._absent.get(name, 0)):
                return
            if answer is None:
                if self._names.pop(name, None) is not None:
                    self._changes += 1
                    self._absent[name] = order
                return
            self._absent.pop(name, None)
            self._names[name] = answer
            self._changes += known is None or known.model != answer.model

    # Writing.

    def move(self, move: Move) -> Snapshot:
        """Moves an alias. MLflow has no preconditions, so this reads, writes and reads back."""
        name, alias = move.name, check_alias(move.alias)
        resolve(self.find(Reference(name, version=move.version)), Reference(name, version=move.version))
        current = self._model(name).aliases.get(alias)
        new = move.applied(current)
        if new == current:
            return self.known()
        self._write_past(name, alias, new)
        self._calls.write(
            "POST", "registered-models/alias", {"name": name, "alias": alias, "version": move.version}
        )
        if current is not None and current.verdict is not None:
            values = {"name": name, "version": current.version, "key": VERDICT_TAG + alias}
            self._calls.attempt("DELETE", "model-versions/delete-tag", values)
        self._refresh(name)
        stands = self._model(name).aliases.get(alias)
        if stands is None or stands.version != move.version:
            now = None if stands is None else stands.version
            raise PreconditionFailed(f"{move} was moved to {now} by another writer meanwhile", now)
        return self.known()

    def record(self, observation: Observation) -> Snapshot | None:
        name, alias = observation.name, observation.alias
        if ":" in name:
            return None
        self._refresh(name)
        known = self._names.get(name)
        current = None if known is None else known.model.aliases.get(alias)
        new = observation.applied(current)
        if new is None or new == current:
            return self.known()
        self._write_past(name, alias, new)
        if new.verdict is not None and (current is None or new.verdict != current.verdict):
            self._tag(
                name, observation.version, VERDICT_TAG + alias, json.dumps(new.verdict.to_json())[:5000]
            )
        self._refresh(name)
        return self.known()

    def delete_alias(self, name: str, alias: str) -> Snapshot:
        self._refresh(name)
        find_alias(self.known(), name, alias)
        self._calls.write("DELETE", "registered-models/alias", {"name": name, "alias": alias})
        with self._lock:  # also an alias that was kept after its version was deleted
            known = self._names.get(name)
            if known is not None:  # another read may have found the model deleted meanwhile
                left = {a: entry for a, entry in known.model.aliases.items() if a != alias}
                kept = Model(name, known.model.versions, left, known.model.rollout)
                self._names[name] = _Known(kept, known.created, known.order)
                self._changes += 1
        self._calls.attempt(
            "DELETE", "registered-models/delete-tag", {"name": name, "key": ALIAS_TAG + alias}
        )
        self._refresh(name)
        return self.known()

    def add_version(
        self,
        name: str,
        package: str,
        digest: str,
        *,
        tags: Mapping[str, str] | None = None,
        alias: str | None = None,
    ) -> Version:
        check_name(name)
        if alias is not None:
            check_alias(alias)
        self._registered(name)
        number = next((n for n, found in self._digests(name) if found == digest), None)
        if number is None:
            origin = self._artifacts.stored(package, digest)
            told = [{"key": k, "value": v} for k, v in {**(tags or {}), DIGEST_TAG: digest}.items()]
            made = self._calls.write("POST", "model-versions/create", {"name": name, "tags": told, **origin})
            number = str((made.get("model_version") or {}).get("version"))
        self._refresh(name, number)
        if number not in self._model(name).versions:
            raise RegistryUnavailable(f"{self.target} does not show version {number} of {name} as ready")
        if alias is not None:
            self.move(Move(name, alias, number))
        return self._model(name).versions[number]

    def record_digest(self, version: Version, digest: str) -> None:
        if not self._tagging or ":" in version.name:
            return
        self._tag(version.name, version.version, DIGEST_TAG, digest)

    def record_status(self, name: str, alias: str, version: str, status: str) -> None:
        if ":" not in name:
            self._tag(name, version, STATUS_TAG + alias, status[:5000])

    def close(self) -> None:
        self._calls.close()
        self._tracking.close()

    def _tag(self, name: str, version: str, tag: str, value: str) -> None:
        values = {"name": name, "version": version, "key": tag, "value": value}
        self._calls.attempt("POST", "model-versions/set-tag", values)

    def _model(self, name: str) -> Model:
        known = self._names.get(name)
        if known is None:
            raise NotInRegistry("MODEL_NOT_FOUND", f"there is no model {name!r} in the registry")
        return known.model

    def _registered(self, name: str) -> None:
        try:
            self._calls.write("POST", "registered-models/create", {"name": name})
        except RegistryError as error:
            cause = error.__cause__
            if not isinstance(cause, MLflowError) or cause.code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _write_past(self, name: str, alias: str, new: Alias) -> None:
        value: dict[str, Any] = {"version": new.version, "previous": list(new.previous), "forced": new.forced}
        value |= {"last_good": new.last_good, "back": new.back}
        value["verdict"] = None if new.verdict is None else new.verdict.to_json()
        tag = {"name": name, "key": ALIAS_TAG + alias, "value": json.dumps(value)}
        try:
            self._calls.write("POST", "registered-models/set-tag", tag)
        except RegistryReadOnly as error:
            log.warning("cannot write the previous version of %s@%s as a tag: %s", name, alias, error)

    def _versions(self, name: str) -> Iterable[dict[str, Any]]:
        quoted = name.replace("'", "''") if "'" in name and '"' in name else name
        mark = '"' if "'" in name else "'"
        values = {"filter": f"name={mark}{quoted}{mark}", "max_results": 200}
        return self._calls.pages("model-versions/search", "model_versions", values)

    def _digests(self, name: str) -> list[tuple[str, str | None]]:
        items = self._versions(name)
        return [(str(item.get("version")), answers.tags(item).get(DIGEST_TAG)) for item in items]

    def _listed(self, registered: Mapping[str, Any]) -> Model:
        name = str(registered.get("name"))
        items = answers.listed_versions(registered).items()
        versions = {n: self._version_of(name, item, str(item.get("source", ""))) for n, item in items}
        return Model(name, versions, self._aliases(registered))
