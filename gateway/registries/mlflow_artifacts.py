"""Locates models' files on an MLflow server: logged models, artifacts of runs, and pushed packages.

The files belong to the tracking server, which may differ from the registry's server. Must not know registered
models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import urlsplit

from gateway.filesystems import asked, connected
from gateway.names import Reference
from gateway.registries import mlflow_answers as answers
from gateway.registries.base import (
    RegistryError,
    RegistryUnavailable,
    Version,
)
from gateway.registries.mlflow_calls import Calls, not_mlflow, refused
from gateway.registries.mlflow_client import MLflowError, MLflowUnavailable, download_seconds
from gateway.registries.resolution import key
from loaders import package as packages
from loaders.files import PackageError, package_files

_PROXIED = re.compile(r"mlflow-artifacts:(?://([^/]*))?/(.*)\Z")
_PROXY_PATH: Final = "/api/2.0/mlflow-artifacts/artifacts/"


class MLflowArtifacts:
    """The artifacts of a tracking server. `experiment`: the id of the experiment for pushed models."""

    def __init__(self, tracking: Calls, experiment: str) -> None:
        self._tracking = tracking
        self._experiment = experiment

    def found(self, reference: Reference) -> Version | None:
        """Returns the logged model, or the model of a run, that a reference names. Raises RegistryError."""
        return self._logged_model(reference) if reference.model_id else self._run_model(reference)

    def _logged_model(self, reference: Reference) -> Version | None:
        try:
            answer = self._tracking.call("GET", f"logged-models/{reference.model_id}")
        except MLflowError as error:
            if error.absent:
                return None
            raise refused(error) from error
        return self._fixed_version(reference, answers.info(answer.get("model")), "")

    def _run_model(self, reference: Reference) -> Version | None:
        """Returns the model of `runs:/RUN/PATH`: the run's own artifacts, else the model that the run logged
        under that name."""
        path = reference.path or ""
        parts = path.split("/")
        if any(part in ("", ".", "..") or re.search(r"[\x00-\x1f\x7f'\"`]", part) for part in parts):
            return None
        try:
            found = self._tracking.call("GET", "runs/get", {"run_id": reference.run_id})
            run = answers.info(found.get("run"))
            values = {"run_id": reference.run_id, "path": path}
            listed = self._tracking.call("GET", "artifacts/list", values)
            if any(str(item.get("path", "")) != path for item in answers.objects(listed.get("files"))):
                return self._fixed_version(reference, run, f"/{path}")
            wanted = {"experiment_ids": [run.get("experiment_id")], "filter": f"name = '{parts[0]}'"}
            logged = self._tracking.call("POST", "logged-models/search", wanted)
        except MLflowError as error:
            if error.absent or error.code == "INVALID_PARAMETER_VALUE":
                return None
            raise refused(error) from error
        for item in answers.objects(logged.get("models")):
            if answers.info(item).get("source_run_id") == reference.run_id:
                return self._fixed_version(
                    reference, answers.info(item), "".join(f"/{part}" for part in parts[1:])
                )
        return None

    def _fixed_version(self, reference: Reference, info: Mapping[str, Any], below: str) -> Version | None:
        place = info.get("artifact_uri")
        if not isinstance(place, str) or not place:
            raise not_mlflow(self._tracking.base)
        if info.get("status", "LOGGED_MODEL_READY") not in ("LOGGED_MODEL_READY", "FINISHED", "RUNNING"):
            return None
        created = answers.moment(info.get("creation_timestamp_ms") or info.get("start_time"))
        source = self.located(place.rstrip("/") + below)
        return Version(key(reference), "1", source, created=created)

    def located(self, place: str) -> str:
        """Returns the server's own form of a location as a source with the server's address."""
        proxied = _PROXIED.match(place)
        if proxied is None:
            return place
        base = self._tracking.base
        if proxied[1] and proxied[1] != urlsplit(base).netloc:
            return place  # on another server, which must not receive this server's credentials
        return f"mlflow+{base}{_PROXY_PATH}{proxied[2]}"

    def stored(self, package: str, digest: str) -> dict[str, Any]:
        """Uploads a model directory. Returns the new version's fields about its origin. The upload becomes a
        logged model, or the artifacts of a run if the server has no logged models (MLflow 2)."""
        tracking = self._tracking
        try:
            wanted = {"experiment_id": self._experiment, "name": "model"}
            model = answers.info(tracking.write("POST", "logged-models", wanted).get("model"))
        except RegistryUnavailable as error:
            cause = error.__cause__
            if not isinstance(cause, MLflowUnavailable) or cause.status != 404:
                raise
            made = tracking.write("POST", "runs/create", {"experiment_id": self._experiment})
            run = answers.info(made.get("run"))
            place = f"{run['artifact_uri']}/model"
            self._upload(package, place, digest)
            ended = {"run_id": run["run_id"], "status": "FINISHED"}
            tracking.write("POST", "runs/update", ended)
            return {"source": place, "run_id": run["run_id"]}
        self._upload(package, str(model["artifact_uri"]), digest)
        identity = model["model_id"]
        values = {"model_id": identity, "status": "LOGGED_MODEL_READY"}
        tracking.write("PATCH", f"logged-models/{identity}", values)
        return {"source": f"models:/{identity}", "model_id": identity}

    def _upload(self, package: str, place: str, digest: str) -> None:
        source = self.located(place)
        try:
            files = package_files(Path(package))
            if source.startswith("mlflow+"):
                below = source.partition(_PROXY_PATH)[2]
                for relative, file, _ in files:
                    self._tracking.client.upload(str(PurePosixPath(below, relative)), file)
            else:
                store, root = connected(source)
                for relative, file, size in files:
                    asked(store, "put_file", download_seconds(size), str(file), f"{root}/{relative}")
        except PackageError as error:
            raise RegistryError(f"{package}: {error}") from None
        except MLflowError as error:
            raise refused(error) from error
        except Exception as error:  # each file system raises the errors of its own library
            problem = f"{package} cannot be stored at {place}: {type(error).__name__}: {error}"
            raise RegistryUnavailable(problem) from error
        if (found := packages.digest(package)) != digest:
            raise RegistryError(f"{package} changed while it was copied: {digest} became {found}")
