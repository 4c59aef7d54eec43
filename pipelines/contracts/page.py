"""The page that tells of one load: what came, what was refused and why, drawn small; an HTML document in one piece."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from matplotlib.text import Text

from pipelines.contracts import rules
from pipelines.contracts.events import from_microseconds
from pipelines.spec import Contract, Field, FieldType, ServiceLevel, Severity

EXAMPLES = 20
"""So many refused rows are shown."""
_DRAWN = 1e300
"""Larger numbers leave no room for an axis around them."""
_BINS, _MOST_RULES, _SHOWN_CHARACTERS = 40, 20, 300
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } th, td { padding: .25rem .75rem; border-bottom: 1px solid #ccc; text-align: left;
vertical-align: top } td.n { text-align: right } svg { max-width: 100%; height: auto } code { overflow-wrap: anywhere }
.small { display: flex; flex-wrap: wrap; gap: .5rem } .bad { color: #a00 }
"""
_SEVERITIES = {Severity.WARN: "warns", Severity.REFUSE: "refuses the load", None: "refuses the row"}


def load_page(
    contract: Contract,
    report: Mapping[str, Any],
    as_of_us: int,
    accepted: pa.Table,
    refused: Sequence[Mapping[str, Any]],
) -> str:
    """The page of a load by its ``report`` (``LoadReport`` as JSON), begun at ``as_of_us``.

    ``accepted`` are its rows in the events table, with the contract's fields; ``refused`` some rows of the quarantine.
    """
    title = f"{contract.name}: load {report['load_id']}"
    facts = {
        "contract": f"{contract.name} {contract.version}, owned by {contract.owner}",
        "began": f"{from_microseconds(as_of_us):%Y-%m-%d %H:%M} UTC",
        "status": report["status"],
        **({"promised": "; ".join(map(_promise, contract.sla))} if contract.sla else {}),
        "rows": f"{report['rows_in']:,} came, {report['accepted']:,} were accepted, {report['quarantined']:,} refused",
    }
    parts = [f"<h1>{escape(title)}</h1>", _table(facts.items())]
    for heading, lines in (("Why nothing was published", report.get("refusals")), ("Warnings", report.get("warnings"))):
        if lines:
            items = "".join(f"<li>{escape(line)}</li>" for line in lines)
            parts.append(f'<h2>{heading}</h2><ul class="bad">{items}</ul>')
    parts.append(_rules_part(contract, report))
    if accepted.num_rows:
        parts.append("<h2>What was accepted</h2>" + _plots(contract, accepted))
    parts.append("<h2>By file</h2>" + _sources(report["by_source"]))
    if refused:
        rows = [
            (", ".join(row["rules"]), f"{row['source']}, {row['position']}", _cut(row["record"]))
            for row in refused[:EXAMPLES]
        ]
        head = f"<h2>Refused rows</h2><p>{len(rows)} of {report['quarantined']:,}.</p>"
        parts.append(head + _table(rows, ("rules", "file and row", "record"), code=2))
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def _promise(level: ServiceLevel) -> str:
    of = f" of {level.element}" if level.element is not None else ""
    return f"{level.name}{of} {level.value}" + (f" {level.unit}" if level.unit else "")


def _rules_part(contract: Contract, report: Mapping[str, Any]) -> str:
    severities = rules.severities(contract)
    counted = {**report["by_rule"], **report.get("warned", {})}
    if not counted:
        return "<h2>Rules</h2><p>No row breaks any.</p>"
    order = sorted(counted, key=lambda rule: (-counted[rule], rule))
    rows = [
        (
            rule,
            f"{counted[rule]:,}",
            f"{counted[rule] / max(report['rows_in'], 1):.2%}",
            _SEVERITIES[severities.get(rule)],
        )
        for rule in order
    ]
    names = order[:_MOST_RULES][::-1]
    figure = Figure(figsize=(8, 0.3 * len(names) + 0.6), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(len(names)), [counted[name] for name in names], gid="rules")
    axes.set_yticks(range(len(names)), labels=[_cut(name, 40) for name in names])
    axes.set_xlabel("rows")
    return "<h2>Rules that rows break</h2>" + _svg(figure) + _table(rows, ("rule", "rows", "of all", "it"))


def _plots(contract: Contract, table: pa.Table) -> str:
    """When events happened, and how each number is spread, with its limits."""
    drawn = []
    for field in contract.fields:
        if field.name == contract.time:
            values = table.column(field.name).cast(pa.int64()).to_numpy() / 1e6
            drawn.append(_histogram(field, values.astype("datetime64[s]").astype(object)))
        elif field.type in (FieldType.FLOAT, FieldType.INTEGER, FieldType.DECIMAL):
            values = table.column(field.name).cast(pa.float64(), safe=False).drop_null().to_numpy()
            if len(values) and np.abs(values).max() < _DRAWN:
                drawn.append(_histogram(field, values))
    return f'<div class="small">{"".join(drawn)}</div>'


def _histogram(field: Field, values: np.ndarray) -> str:
    figure = Figure(figsize=(3, 1.8), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(values, bins=_bins(values), gid=f"values-{field.name}")
    low, high = axes.get_xlim()
    for limit in (field.minimum, field.maximum):
        if limit is not None and field.type is not FieldType.TIMESTAMP and low <= limit <= high:
            axes.axvline(limit, color="#a00", linewidth=1)
    axes.set_title(field.name + (f" ({field.unit})" if field.unit else ""), fontsize=9)
    axes.tick_params(labelsize=7)
    if field.type is FieldType.TIMESTAMP:
        figure.autofmt_xdate()
    return _svg(figure)


def _bins(values: np.ndarray) -> Any:
    """As many as can be told apart at the size that the values have."""
    if values.dtype == object:  # instants
        return _BINS
    low, high = float(values.min()), float(values.max())
    if high / _BINS - low / _BINS > 4 * np.spacing(max(abs(low), abs(high))):
        return np.linspace(low, high, _BINS + 1)
    room = max(1.0, abs(low) * 1e-6)
    return [low - room, high + room]


def _sources(by_source: Mapping[str, Mapping[str, int]]) -> str:
    rows = [
        (name, *(f"{tally[kind]:,}" for kind in ("rows_in", "accepted", "quarantined")))
        for name, tally in sorted(by_source.items())
    ]
    return _table(rows, ("file", "rows", "accepted", "refused"))


def _table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), code: int | None = None) -> str:
    """Cells as text, those of column ``code`` as written."""
    top = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>" if head else ""
    body = "".join(
        f"<tr>{''.join(_cell(cell, code=place == code) for place, cell in enumerate(row))}</tr>" for row in rows
    )
    return f"<table>{top}{body}</table>"


def _cell(text: str, *, code: bool) -> str:
    return f"<td><code>{escape(text)}</code></td>" if code else f"<td>{escape(text)}</td>"


def _cut(text: str, longest: int = _SHOWN_CHARACTERS) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _svg(figure: Figure) -> str:
    drawn = io.StringIO()
    for words in figure.findobj(Text):  # a name with dollars is no formula
        words.set_parse_math(False)
    figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = drawn.getvalue()
    return text[text.index("<svg") :]
