"""The page that tells of an A/B test: what was found, and how the intervals narrowed, from the journal alone."""

from __future__ import annotations

import io
import math
from datetime import UTC, datetime
from html import escape
from typing import Any

from matplotlib.figure import Figure

from pipelines.spec import Goal
from serving.rollout.comparison import Compared, compare
from serving.rollout.journal import Situation
from serving.rollout.projections import describe_test

_COLUMNS = ("version", "units", "mean", "difference to the champion", "from", "to", "finding")
_POINTS = 200
"""More would be seen by nobody, and the process that draws them answers predictions."""
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } th, td { padding: .25rem .75rem; border-bottom: 1px solid #ccc; text-align: right }
th:first-child, td:first-child { text-align: left } svg { max-width: 100%; height: auto }
"""


def report(usecase: str, situation: Situation, now_us: int) -> str:
    """The A/B test of a situation (``Journal.test``) as an HTML document without anything that has to be fetched.

    A definition that the present code does not know raises pydantic's ``ValidationError``.
    """
    described = describe_test(situation, now_us)
    test, champion = situation.test, situation.tested
    results = situation.evidence.results
    named = f"A/B test {described['test']} of {usecase}"
    final = compare(test, champion, results[-1].arms if results else ())
    wanted = "higher" if test.goal is Goal.HIGHER else "lower"
    of = "entity" if test.unit.value == "entity" else "instance"
    facts = {
        "began": _moment(described["started_us"]),
        "outcomes through": _moment(described["at_us"]) if described["at_us"] else "none yet",
        "state": _state(described),
        "measured": f"the mean {test.measure.value} of each {of}; the {wanted} the better",
        "confidence": f"{100 * test.confidence:.6g}% for all variants together, at any time; asymptotic",
        "assigned units since it began or was resumed": ", ".join(
            f"{version}: {count:,}"
            for version, count in zip((champion, *test.versions), described["assigned"], strict=False)
        )
        or "none yet",
        "answered by variants": f"{described['served']:,}; by the champion in their place {described['harmed']:,}",
    }
    rows = [
        [champion + " (champion)", f"{described['champion_units']:,}", _figure(described["champion_mean"]), *[""] * 4]
    ]
    rows += [_row(one) for one in final]
    head = "".join(f"<th>{escape(column)}</th>" for column in _COLUMNS)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    told = "".join(f"<tr><td>{escape(name)}</td><td>{escape(str(fact))}</td></tr>" for name, fact in facts.items())
    plot = _plot(situation) if results else "<p>No unit has an outcome yet.</p>"
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(named)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(named)}</h1><table>{told}</table>"
        f"<h2>Versions</h2><table><tr>{head}</tr>{body}</table>"
        f"<h2>Difference to the champion, over time</h2>{plot}</body></html>"
    )


def _state(described: dict[str, Any]) -> str:
    if not described["running"]:
        won = f", version {described['winner']}; its release was asked for" if described["winner"] else ""
        return f"{described['outcome']}{won}"
    return f"{'paused' if described['paused'] else 'running'}: {described.get('reason', '')}"


def _row(one: Compared) -> list[str]:
    figures = [_figure(figure) for figure in (one.mean, one.difference, one.low, one.high)]
    return [one.version, f"{one.units:,}", *figures, one.finding.value]


def _figure(figure: float | None) -> str:
    return "" if figure is None or not math.isfinite(figure) else f"{figure:.6g}"


def _moment(moment_us: int) -> str:
    return f"{datetime.fromtimestamp(moment_us / 1e6, UTC):%Y-%m-%d %H:%M} UTC"


def _plot(situation: Situation) -> str:
    """The confidence sequence of every variant as an SVG element, one below the other."""
    test, champion, results = situation.test, situation.tested, situation.evidence.results
    began, day = situation.evidence.started_us, 86_400e6
    figure = Figure(figsize=(9, 2.4 * len(test.versions) + 0.6), layout="constrained")
    step = -(-len(results) // _POINTS)
    shown = results[::-1][::step][::-1]  # the last one is among them
    series = [(result.at_us, compare(test, champion, result.arms)) for result in shown]
    for place, version in enumerate(test.versions):
        known = [(at, found[place]) for at, found in series if math.isfinite(found[place].high)]
        axes = figure.add_subplot(len(test.versions), 1, place + 1)
        days = [(at - began) / day for at, _ in known]
        low, high = [one.low for _, one in known], [one.high for _, one in known]
        axes.axhline(0, color="black", linewidth=0.8)
        axes.fill_between(days, low, high, alpha=0.25, step="post", gid=f"interval-{version}")
        axes.step(days, [one.difference for _, one in known], where="post", marker=".", gid=f"difference-{version}")
        if known:  # the first intervals are so wide that nothing else would be seen
            reach = 4 * max(high[-1] - low[-1], abs(known[-1][1].difference), 1e-12)
            axes.set_ylim(known[-1][1].difference - reach, known[-1][1].difference + reach)
        axes.set_ylabel(f"version {version}")
    figure.axes[-1].set_xlabel("days since the test began")
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = drawn.getvalue()
    return text[text.index("<svg") :]
