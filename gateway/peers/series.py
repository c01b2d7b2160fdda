"""The metrics of the peers, read at each scrape. Their labels are the aliases that this gateway serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from gateway.peers.exchange import Peers


class PeerSeries(Collector):
    """`serving` gives the version in service of each alias here."""

    def __init__(self, peers: Peers, serving: Callable[[], Mapping[tuple[str, str], str | None]]) -> None:
        self._peers = peers
        self._serving = serving

    def collect(self) -> Iterator[Metric]:
        peers = self._peers
        family = GaugeMetricFamily(
            "gateway_peers",
            "Other gateways behind the name `peers`, by whether they answer.",
            labels=["state"],
        )
        family.add_metric(["reached"], len(peers.reached()))
        family.add_metric(["lost"], len(peers.lost()))
        yield family
        if (age := peers.last_contact()) is not None:
            yield GaugeMetricFamily(
                "gateway_peer_contact_age_seconds", "Time since a message of another gateway was heard.", age
            )
        messages = CounterMetricFamily(
            "gateway_peer_messages",
            "Messages of peers by result: accepted, refused (not believed), failed (a peer did not answer).",
            labels=["result"],
        )
        for result, count in peers.counts.items():
            messages.add_metric([result], count)
        yield messages
        skew = GaugeMetricFamily(
            "gateway_alias_skew", "Peers that serve another version of an alias than this gateway.",
            labels=["model", "alias"],
        )  # fmt: skip
        distinct = GaugeMetricFamily(
            "gateway_alias_peer_versions", "Versions of an alias that this gateway and its peers serve.",
            labels=["model", "alias"],
        )  # fmt: skip
        versions = peers.versions()
        for (model, alias), version in self._serving().items():
            told = versions.get((model, alias))
            if version is None or told is None:
                continue
            skew.add_metric([model, alias], sum(told.values()) - told.get(version, 0))
            distinct.add_metric([model, alias], len(told.keys() | {version}))
        yield skew
        yield distinct
