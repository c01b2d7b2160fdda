"""Connects the gauges of `gateway.metrics` to their values: one callable per gauge, called at each scrape."""

from __future__ import annotations

from gateway import cgroup
from gateway.http.connections import Connections, descriptors
from gateway.metrics import Metrics
from gateway.peers import Peers
from gateway.peers.series import PeerSeries
from gateway.registries.watcher import Watch
from gateway.serving.manager import Manager
from gateway.upkeep import Upkeep
from gateway.views import Views


def expose(
    metrics: Metrics,
    manager: Manager,
    views: Views,
    watch: Watch,
    connections: Connections,
    upkeep: Upkeep,
    peers: Peers | None,
) -> None:
    """Connects every gauge to its source."""
    ledger = manager.ledger

    def queues() -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for servable in manager:
            if servable in ledger:
                queued, leased = found.get(servable.version.name, (0, 0))
                found[servable.version.name] = (queued + servable.queued, leased + ledger[servable].leases)
        return found

    processors = cgroup.cpus()

    def load() -> tuple[int, int]:
        busy = slots = 0
        for servable in manager:
            inflight, places = servable.calls
            busy += inflight
            slots += places
        return busy, max(1, min(slots, processors))

    metrics.vitals.load = load
    metrics.watch(
        memory=views.memory,
        models=lambda: {(s.version.name, s.version.version): ledger[s].bytes for s in manager if s in ledger},
        mismatches=lambda: [
            (s.version.name, s.version.version) for s in manager if s.mismatch is not None and s in ledger
        ],
        queue=queues,
        aliases=views.alias_states,
        rollouts=views.rollout_phases,
        stuck=manager.stuck,
        disk=lambda: upkeep.disk_bytes,
        registry_age=watch.age,
        connections=lambda: (connections.open, connections.most),
        stalled=lambda: connections.stalled,
        descriptors=descriptors,
    )
    if peers is not None:
        metrics.peers = PeerSeries(
            peers, lambda: {key: version for key, (version, _) in views.alias_states()}
        ).families
