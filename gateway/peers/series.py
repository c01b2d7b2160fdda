"""The metrics of the peers, read at each scrape. Their labels are the aliases that this gateway serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from gateway.exposition import Family, Row

if TYPE_CHECKING:
    from gateway.peers.exchange import Peers


class PeerSeries:
    """`serving` gives the version in service of each alias here."""

    def __init__(self, peers: Peers, serving: Callable[[], Mapping[tuple[str, str], str | None]]) -> None:
        self._peers = peers
        self._serving = serving

    def families(self) -> Iterator[Family]:
        peers = self._peers
        states: list[Row] = [(("reached",), len(peers.reached())), (("lost",), len(peers.lost()))]
        yield Family(
            "gateway_peers", "Other gateways behind the name `peers`, by whether they answer.", "gauge",
            ("state",), states,
        )  # fmt: skip
        if (age := peers.last_contact()) is not None:
            yield Family(
                "gateway_peer_contact_age_seconds", "Time since a message of another gateway was heard.",
                "gauge", (), [((), age)],
            )  # fmt: skip
        yield Family(
            "gateway_peer_messages",
            "Messages of peers by result: accepted, refused (not believed), failed (a peer did not answer).",
            "counter", ("result",), [((result,), count) for result, count in peers.counts.items()],
        )  # fmt: skip
        skew: list[Row] = []
        distinct: list[Row] = []
        versions = peers.versions()
        for alias, version in self._serving().items():
            told = versions.get(alias)
            if version is None or told is None:
                continue
            skew.append((alias, sum(told.values()) - told.get(version, 0)))
            distinct.append((alias, len(told.keys() | {version})))
        labels = ("model", "alias")
        said = "Peers that serve another version of an alias than this gateway."
        yield Family("gateway_alias_skew", said, "gauge", labels, skew)
        said = "Versions of an alias that this gateway and its peers serve."
        yield Family("gateway_alias_peer_versions", said, "gauge", labels, distinct)
