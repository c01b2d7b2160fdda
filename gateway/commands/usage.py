"""`usage`: shows what teams and models have used at the running gateway.

Knows the route and its answer; must not know how usage is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from gateway.commands.options import ConfigOption, KeyOption, OutputOption, UrlOption, connect
from gateway.commands.terminal import Output, result, table


def usage(
    by: Annotated[str, typer.Option(metavar="team,model", help="Sum up by these.")] = "team,model",
    url: UrlOption = None,
    admin_key_file: KeyOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Show what teams and models have used, at this gateway and those before it with the same state_dir.

    CPU S are CPU-seconds; GB H are gigabyte-hours of memory. idle is what models used while no request came,
    shared is the gateway's own process and the processes that serve all models. The parts add up to the
    total.
    """
    with connect(url, admin_key_file, config) as client:
        view = client.call("GET", f"/usage?by={by}")
        result(output, {**view, "target": client.url}, lambda: _show(view))


def _show(view: Mapping[str, Any]) -> None:
    rows = [[_named(one.get("team")), one.get("model", "-"), *_cells(one)] for one in view["usage"]]
    rows += [["idle", one.get("model", "-"), *_cells(one)] for one in view["idle"]]
    rows += [["shared", name, *_cells(one)] for name, one in view["shared"].items()]
    rows.append(["total", "", *_cells(view["total"])])
    numbers = ["REQUESTS", "ROWS", "CPU S", "GB H"]
    table(["TEAM", "MODEL", *numbers], rows, right=numbers)


def _named(team: str | None) -> str:
    return team or "-"


def _cells(one: Mapping[str, Any]) -> list[str]:
    counts = [str(one[name]) if name in one else "-" for name in ("requests", "rows")]
    return [*counts, f"{one['cpu_seconds']:.1f}", f"{one['memory_byte_seconds'] / 3.6e12:.3f}"]
