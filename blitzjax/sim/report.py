"""How are outcomes shown? A table for machines (JSON, CSV) and one HTML page with its plots inside it.

Invariant: everything the page plots is also in the JSON file.
"""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Literal

from blitzjax.sim.outcome import PERCENTILES, Outcome, mean
from blitzjax.sim.plots import Line, plot

SLO_FACTOR = 5.0  # a request violates its SLO above this many times the average of a full provision (section 10.4)

Row = dict[str, str | int | float]

_STYLE = ("body{font:14px system-ui,sans-serif;max-width:1080px;margin:2em auto;color:#222}"
          "table{border-collapse:collapse}"
          "td,th{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child"
          "{text-align:left}.plots{display:flex;flex-wrap:wrap;gap:1em}")


def table(outcomes: Sequence[Outcome]) -> list[Row]:
    """One row per outcome. Limits come from the fully provisioned outcome if there is one, else from the first."""
    of = _reference(outcomes)
    return [_row(outcome, SLO_FACTOR * mean(of.ttft_s), SLO_FACTOR * mean(of.tpot_s)) for outcome in outcomes]


def _reference(outcomes: Sequence[Outcome]) -> Outcome:
    return next((o for o in outcomes if o.setup.system.share == 1.0), outcomes[0])


def _row(o: Outcome, ttft_limit_s: float, tpot_limit_s: float) -> Row:
    row: Row = {"system": o.setup.system.name, "requests": o.ended, "rejects": o.rejects,
                "ttft_mean_s": mean(o.ttft_s), "tpot_mean_s": mean(o.tpot_s)}
    for name in ("ttft", "tpot"):
        row |= {f"{name}_p{p}_s": o.percentiles(name)[p] for p in PERCENTILES}
    ups = [up.stop - up.start for up in o.scale_ups]
    row |= {"slo_violations": o.violations(ttft_limit_s, tpot_limit_s), "gpu_s": o.gpu_s,
            "host_copies": o.host_copy_s / o.end_s, "host_bytes": o.host_copy_s / o.end_s * o.setup.model.param_bytes,
            "scale_ups": len(ups), "scale_downs": len(o.releases), "scale_up_mean_s": sum(ups) / max(len(ups), 1)}
    return row | {f"{kind}_bytes": moved for kind, moved in sorted(o.link_bytes.items())}


def to_csv(rows: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def to_json(outcomes: Sequence[Outcome], arguments: Mapping[str, object]) -> str:
    """Arguments, table, and per system: CDFs (percentiles 0..100), one-second samples, scale events, bytes of every
    link that carried some."""
    return json.dumps({"arguments": arguments, "table": table(outcomes), "systems": {
        o.setup.system.name: {
            "ttft_s_percentiles": o.percentiles("ttft"),
            "tpot_s_percentiles": o.percentiles("tpot"),
            "ttft_s_by_arrival_second": _by_second(o),
            "samples": [[s.at, s.instances, s.host_copies, s.requests] for s in o.samples],
            "scale_ups": [[up.ticket, up.instance, up.start, up.stop] for up in o.scale_ups],
            "releases": [list(release) for release in o.releases],
            "link_bytes": {name: moved for name, moved in o.links.items() if moved}} for o in outcomes}})


def to_html(outcomes: Sequence[Outcome], arguments: Mapping[str, object]) -> str:
    names = [o.setup.system.name for o in outcomes]

    def lines(points: Sequence[Sequence[tuple[float, float]]]) -> list[Line]:
        return [Line(name, list(pairs)) for name, pairs in zip(names, points)]

    def cdf(of: Literal["ttft", "tpot"]) -> list[Line]:
        return lines([[(x, p / 100) for p, x in enumerate(o.percentiles(of))] for o in outcomes])

    plots = [
        plot("TTFT: share of requests", "s", cdf("ttft"), log_x=True),
        plot("TPOT: share of requests", "s", cdf("tpot"), log_x=True),
        plot("TTFT, mean by second of arrival", "s", lines([_by_second(o) for o in outcomes])),
        plot("Instances that hold or receive the model", "s", lines([[(s.at, s.instances) for s in o.samples]
                                                                    for o in outcomes]), step=True),
        plot("Copies in host memory", "s", lines([[(s.at, s.host_copies) for s in o.samples] for o in outcomes]),
             step=True),
        plot("Requests in the system", "s", lines([[(s.at, s.requests) for s in o.samples] for o in outcomes])),
    ]
    said = ", ".join(f"{key} {value}" for key, value in arguments.items())
    return (f"<!doctype html><meta charset=utf-8><title>blitzjax sim</title><style>{_STYLE}</style>"
            f"<h1>blitzjax sim</h1><p>{html.escape(said)}</p>"
            f"{_table_html(table(outcomes), _reference(outcomes).setup.system.name)}"
            f"<div class=plots>{''.join(plots)}</div>")


_SHOWN = ("system", "requests", "ttft_mean_s", "ttft_p50_s", "ttft_p95_s", "ttft_p99_s", "tpot_mean_s", "tpot_p95_s",
          "slo_violations", "gpu_s", "host_copies", "scale_ups", "scale_up_mean_s")


def to_text(rows: Sequence[Row]) -> str:
    """The main columns, aligned."""
    cells = [list(_SHOWN)] + [[_short(row[key]) for key in _SHOWN] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.rjust(width) if k else cell.ljust(width)
                               for k, (cell, width) in enumerate(zip(line, widths))) for line in cells)


def cold(outcomes: Sequence[Outcome]) -> str:
    """Per system: TTFT and number of the requests that came while no instance had all of their model."""
    return ", ".join(f"{o.setup.system.name} {mean(o.cold_ttft_s):.3g} s ({len(o.cold_ttft_s)})" for o in outcomes)


def _table_html(rows: Sequence[Row], reference: str) -> str:
    moved = [key for key in rows[0] if key.endswith("_bytes") and key != "host_bytes"]
    gigabytes: list[Row] = [
        {"system": row["system"]} | {key.removesuffix("_bytes"): float(row[key]) / 1e9 for key in moved}
        for row in rows]
    return (f"{_cells_html(rows, _SHOWN)}<p>Seconds. SLO: {SLO_FACTOR:g} times the average of {reference}.</p>"
            f"<h2>Moved, GB</h2>{_cells_html(gigabytes, list(gigabytes[0]))}<p>All instances, by kind of link; "
            "each hop counts where it leaves and where it arrives.</p>")


def _cells_html(rows: Sequence[Row], keys: Sequence[str]) -> str:
    head = "".join(f"<th>{key.removesuffix('_s')}" for key in keys)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(_short(row[key]))}" for key in keys) for row in rows)
    return f"<table><tr>{head}{body}</table>"


def _short(value: str | int | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) and value < 1000 else f"{value:.0f}" if isinstance(
        value, float) else str(value)


def _by_second(o: Outcome) -> list[tuple[float, float]]:
    """(second, mean TTFT of the requests that arrived in it)."""
    waited: dict[int, list[float]] = {}  # second → [requests, sum]; an hour has millions of requests
    for at, ttft_s in zip(o.arrived_s, o.ttft_s):
        second = waited.setdefault(int(at), [0.0, 0.0])
        second[0] += 1
        second[1] += ttft_s
    return [(float(second), total / count) for second, (count, total) in sorted(waited.items())]
