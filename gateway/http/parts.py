"""The parts of the gateway that the HTTP layer receives. It never gets the whole application."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.http.auth import Access
    from gateway.http.bodies import BodyReader
    from gateway.http.feed import Feed
    from gateway.http.large import LargeBodies
    from gateway.metrics import Metrics
    from gateway.registries.watcher import Watch
    from gateway.rollouts.promotions import Promotions
    from gateway.rollouts.residency import Residency
    from gateway.service import Service
    from gateway.settings import Settings
    from gateway.views import Views


@dataclass(frozen=True, slots=True)
class Parts:
    """`bodies` counts the bodies of predictions, by whatever protocol they come; `draining`: whether the
    gateway is stopping and clients should go elsewhere."""

    service: Service
    views: Views
    promotions: Promotions
    residency: Residency
    watch: Watch
    access: Access
    metrics: Metrics
    settings: Settings
    bodies: BodyReader
    large_bodies: LargeBodies
    draining: Callable[[], bool]
    feed: Feed
