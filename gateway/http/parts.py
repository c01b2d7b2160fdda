"""The parts of the gateway that the HTTP layer receives. It never gets the whole application."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.access import Access
from gateway.http.bodies import BodyReader
from gateway.http.callers import Callers
from gateway.http.captures import Captures
from gateway.http.feed import Feed
from gateway.http.large import LargeBodies

if TYPE_CHECKING:
    from gateway.capture.recorder import Recorder
    from gateway.metrics import Metrics
    from gateway.peers import Peers
    from gateway.registries.watcher import Watch
    from gateway.rollouts.promotions import Promotions
    from gateway.rollouts.residency import Residency
    from gateway.service import Service
    from gateway.settings import Settings
    from gateway.spans import Spans
    from gateway.usage import Usage
    from gateway.views import Views


@dataclass(frozen=True, slots=True)
class Parts:
    """`draining`: whether the gateway is stopping and clients should go elsewhere. `spans`: None where no
    traces are exported. `peers`: the other gateways, if the settings name them. The last five belong to HTTP
    itself: who may call, bodies of predictions by whatever protocol they come, the event stream, and captured
    requests."""

    service: Service
    views: Views
    promotions: Promotions
    residency: Residency
    watch: Watch
    metrics: Metrics
    settings: Settings
    draining: Callable[[], bool]
    usage: Usage
    spans: Spans | None
    peers: Peers | None
    access: Callers
    bodies: BodyReader
    large_bodies: LargeBodies
    feed: Feed
    captures: Captures

    @classmethod
    def of(
        cls,
        settings: Settings,
        service: Service,
        views: Views,
        promotions: Promotions,
        residency: Residency,
        watch: Watch,
        metrics: Metrics,
        recorder: Recorder,
        *,
        access: Access,
        usage: Usage,
        peers: Peers | None,
        draining: Callable[[], bool],
        spans: Spans | None = None,
    ) -> Parts:
        """These parts of the gateway, with what HTTP itself needs as the settings say."""
        return cls(
            service,
            views,
            promotions,
            residency,
            watch,
            metrics,
            settings,
            draining,
            usage,
            spans,
            peers,
            access=Callers(access, elsewhere=settings.admin_listen is not None),
            bodies=BodyReader(settings.max_body_bytes, settings.max_inflight_bytes),
            large_bodies=LargeBodies(settings.max_inflight_bytes),
            feed=Feed(),
            captures=Captures(recorder),
        )
