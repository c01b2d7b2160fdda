"""`status`, `load` and `unload`: what a running gateway holds and why, and the operator's verbs.

Knows the control routes and the names of three metrics; no registry and no model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from gateway.commands.options import (
    KeyOption,
    OutputOption,
    ReferenceArgument,
    UrlOption,
    connect,
    reference_of,
)
from gateway.commands.terminal import Output, result, size, table, working

if TYPE_CHECKING:
    from gateway.commands.client import Client

Key: TypeAlias = tuple[str, str]
"""A model's name and a version."""

_FEWEST = 20

WaitOption = Annotated[bool, typer.Option("--wait/--no-wait", help="Until it is done, or only ask for it.")]


def status(
    url: UrlOption = None,
    every: Annotated[bool, typer.Option("--all", help="Versions that are not loaded as well.")] = False,
    interval: Annotated[
        float, typer.Option(metavar="S", min=0.1, max=60, help="Seconds over which requests/s are counted.")
    ] = 1.0,
    output: OutputOption = Output.text,
) -> None:
    """Show what the running gateway holds, and why.

    State, memory, requests/s, p99 and last error: one line for every version that is loaded, loading or
    failed, and for every alias that is not where the registry wants it. p99 is over all requests since the
    version was first asked: an estimate from the histogram in /metrics, interpolated within its bucket as
    Prometheus does it; none before twenty requests.
    """
    with connect(url, None) as client:
        before = _counted(client)
        started = time.monotonic()
        time.sleep(interval)
        after = _counted(client)
        seconds = time.monotonic() - started
        ready = client.call("GET", "/readyz", accept=(503,))
        models, rollouts = client.call("GET", "/models"), client.call("GET", "/rollouts")
        rates = {key: (n - before.get(key, (0, {}))[0]) / seconds for key, (n, _) in after.items()}
        tails = {key: _p99(buckets) for key, (_, buckets) in after.items()}
        rows = _rows(models["models"], rollouts["rollouts"], rates, tails)
        shown = [row for row in rows if every or row["state"] != "UNLOADED" or row["last_error"]]
        view = {"url": client.url, **ready, "versions": shown, "not_shown": len(rows) - len(shown)}
        result(output, view, lambda: _show(view))


def load(
    reference: ReferenceArgument,
    wait: WaitOption = True,
    url: UrlOption = None,
    admin_key_file: KeyOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Load a version into the running gateway now.

    Instead of on its first request. A version that failed before is tried again at once.
    """
    _verb("load", reference, wait, url, admin_key_file, output)


def unload(
    reference: ReferenceArgument,
    wait: WaitOption = True,
    url: UrlOption = None,
    admin_key_file: KeyOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Unload a version from the running gateway.

    Once its requests are answered. The next request for it loads it again.
    """
    _verb("unload", reference, wait, url, admin_key_file, output)


def _verb(verb: str, text: str, wait: bool, url: str | None, admin_key_file: Any, output: Output) -> None:
    from gateway.names import url_path

    reference = reference_of(text)
    if not reference.name or reference.latest:
        raise typer.BadParameter(f"{text!r}: write NAME, NAME@ALIAS or NAME/VERSION")
    with connect(url, admin_key_file) as client, working(f"{verb} {text} at {client.url}"):
        done = client.call("POST", f"/models/{url_path(reference)}/{verb}", timeout=0, wait=wait)
    version = f"{done['name']}/{done['version']}" if "version" in done else done["name"]
    result(output, {**done, "target": client.url}, f"{version} is {done['state']} at {client.url}")


def _rows(
    models: Sequence[Mapping[str, Any]],
    rollouts: Sequence[Mapping[str, Any]],
    rates: Mapping[Key, float],
    tails: Mapping[Key, float | None],
) -> list[dict[str, Any]]:
    """What the table shows, a version each: of the loaded and of those that an alias serves or wants."""
    aliases: dict[Key, list[str]] = {}
    errors: dict[Key, str] = {}
    for rollout in rollouts:
        name, alias, desired, serving = (rollout[field] for field in ("name", "alias", "desired", "serving"))
        if serving is None or serving == desired:
            aliases.setdefault((name, desired), []).append(alias)
        else:
            aliases.setdefault((name, serving), []).append(alias)
            aliases.setdefault((name, desired), []).append(f"{alias} (wanted)")
        if rollout["error"]:
            errors[name, desired] = rollout["error"]
    rows = []
    for model in models:
        for version in model["versions"]:
            key = (model["name"], version["version"])
            failed = version["reason"] if version["state"] == "FAILED" else None
            rows.append(
                {
                    "model": key[0],
                    "version": key[1],
                    "aliases": aliases.get(key, []),
                    "state": version["state"],
                    "progress": version["reason"] if version["state"] == "LOADING" else None,
                    "bytes": version["bytes"],
                    "requests_per_second": round(rates.get(key, 0.0), 1),
                    "p99_seconds": tails.get(key),
                    "last_error": failed or errors.get(key),
                }
            )
    return rows


def _show(view: Mapping[str, Any]) -> None:
    memory, registry = view["memory"], view["registry"]
    held = sum(memory.get(state) or 0 for state in ("reserved", "resident", "closing"))
    limit = memory.get("limit_bytes")
    facts = [f"{view['url']} {'ready' if view['ready'] else 'NOT ready'}"]
    facts.append(f"memory {size(held)} of {size(limit)}")
    age = registry.get("age_seconds")
    facts.append(f"registry {registry['target']} read {'never' if age is None else f'{age:.1f} s ago'}")
    typer.echo(" · ".join(facts))
    if registry.get("error"):
        typer.echo(f"registry error: {registry['error']}")
    if view["versions"]:
        columns = ["MODEL", "VERSION", "ALIASES", "STATE", "MB", "REQ/S", "P99 MS", "LAST ERROR"]
        rows = [_cells(row) for row in view["versions"]]
        table(columns, rows, right=["VERSION", "MB", "REQ/S", "P99 MS"])
    if view["not_shown"]:
        typer.echo(f"not loaded: {view['not_shown']} other versions; --all shows them")


def _cells(row: Mapping[str, Any]) -> list[str]:
    aliases, held, tail = row["aliases"], row["bytes"], row["p99_seconds"]
    return [
        row["model"],
        row["version"],
        ", ".join(aliases) or "-",
        row["state"] if row["progress"] is None else f"{row['state']}: {row['progress']}",
        "-" if held is None else f"{held / 1e6:.1f}",
        f"{row['requests_per_second']:.1f}",
        "-" if tail is None else f"{tail * 1000:.1f}",
        row["last_error"] or "-",
    ]


def _counted(client: Client) -> dict[Key, tuple[float, dict[float, float]]]:
    """By version: answers given, and how many of them took at most so many seconds (a running total)."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[Key, tuple[float, dict[float, float]]] = {}
    for family in text_string_to_metric_families(client.text("/metrics")):
        for sample in family.samples:
            key = (sample.labels.get("model", ""), sample.labels.get("version", ""))
            count, buckets = found.get(key, (0.0, {}))
            if sample.name == "gateway_requests_total" and key[0]:
                found[key] = (count + sample.value, buckets)
            elif sample.name == "gateway_request_seconds_bucket":
                found[key] = (count, {**buckets, float(sample.labels["le"]): sample.value})
    return found


def _p99(buckets: Mapping[float, float]) -> float | None:
    """The 99th percentile in seconds, interpolated within its bucket as PromQL's `histogram_quantile` does;
    beyond the last bound it is that bound. None for so few requests that it would only tell of the slowest,
    which most often waited for the load."""
    bounds = sorted(buckets)
    if not bounds or buckets[bounds[-1]] < _FEWEST:
        return None
    wanted = 0.99 * buckets[bounds[-1]]
    below, count_below = 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= wanted:
            if math.isinf(bound):
                return below
            inside = buckets[bound] - count_below
            return below + (bound - below) * ((wanted - count_below) / inside if inside else 1.0)
        below, count_below = bound, buckets[bound]
    return below
