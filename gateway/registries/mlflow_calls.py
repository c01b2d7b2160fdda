"""Calls an MLflow server, and converts its failures to the registry's errors.

Uses the REST interface through `mlflow_client`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from gateway.registries import mlflow_answers as answers
from gateway.registries.base import (
    RegistryError,
    RegistryReadOnly,
    RegistryUnavailable,
)
from gateway.registries.mlflow_client import MLflowClient, MLflowError, MLflowUnavailable

log = logging.getLogger("gateway.registries.mlflow")

LISTED: Final = 1000


class Unavailable(RegistryUnavailable):
    """The server is not available. `reached`: it answered, so another query may succeed."""

    def __init__(self, error: MLflowUnavailable) -> None:
        super().__init__(str(error), error.retry_after)
        self.reached = error.reached
        if error.status in (401, 403):
            self.hint = None  # the message says what to set


class Calls:
    """One server. `call` raises its refusals as MLflowError; the other methods raise RegistryError."""

    def __init__(self, client: MLflowClient) -> None:
        self.client = client
        self.base = client.base

    def call(
        self, method: str, path: str, values: Mapping[str, Any] | None = None, *, retries: int | None = None
    ) -> dict[str, Any]:
        """Calls the server. Raises Unavailable, and MLflowError if the server refuses."""
        try:
            return self.client.call(method, path, values, retries=retries)
        except MLflowUnavailable as error:
            raise Unavailable(error) from error

    def read(self, path: str, values: Mapping[str, Any], *, retries: int | None = None) -> dict[str, Any]:
        try:
            return self.call("GET", path, values, retries=retries)
        except MLflowError as error:
            raise refused(error) from error

    def pages(self, path: str, field: str, values: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns the items of all pages, at most `LISTED`."""
        found: list[dict[str, Any]] = []
        while len(found) < LISTED:
            answer = self.read(path, values)
            found += answers.objects(answer.get(field))
            if not answer.get("next_page_token"):
                break
            values = {**values, "page_token": answer["next_page_token"]}
        return found[:LISTED]

    def write(self, method: str, path: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Writes to the server. Raises RegistryReadOnly if these credentials may not write."""
        try:
            return self.client.call(method, path, values)
        except MLflowUnavailable as error:
            if error.status == 403:
                raise RegistryReadOnly(f"these credentials may not write to {self.base}") from error
            raise Unavailable(error) from error
        except MLflowError as error:
            raise refused(error) from error

    def attempt(self, method: str, path: str, values: Mapping[str, Any]) -> None:
        """Writes an optional tag. A failure goes only to the log."""
        try:
            self.call(method, path, values)
        except (MLflowError, RegistryUnavailable) as error:
            log.info("cannot write the tag %s of %s: %s", values["key"], values["name"], error)

    def close(self) -> None:
        self.client.close()


def refused(error: MLflowError) -> RegistryError:
    if isinstance(error, MLflowUnavailable):
        return Unavailable(error)
    return RegistryError(f"the MLflow server refuses: {error}")


def not_mlflow(base: str) -> Unavailable:
    return Unavailable(MLflowUnavailable(f"the answer of {base} is not an MLflow answer", reached=True))
