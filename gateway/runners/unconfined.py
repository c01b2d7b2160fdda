"""Warns about confinement that this machine does not support. Knows only the status of runners."""

from __future__ import annotations

import logging
from collections.abc import Mapping

log = logging.getLogger("gateway")


class Unconfined:
    """Logs once each measure that the kernel, or the location of the files, does not allow."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def check(self, confinement: Mapping[str, str]) -> None:
        """`confinement`: measure -> its state in a runner's status."""
        for measure, held in confinement.items():
            chosen = held.startswith("not changed") and not held.startswith("not changed: another user")
            if held.startswith("not ") and not chosen and measure not in self._logged:
                self._logged.add(measure)
                log.warning("models are confined less than they could be: %s: %s", measure, held)
