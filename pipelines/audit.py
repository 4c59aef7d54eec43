"""The skew audit as a job: a sample of what was served lately is made again and compared to the last bit.

``python -m pipelines.audit aqua [--hours 24] [--share 0.05]`` prints its report as one line of JSON, the last of its
output. It exits with 0 when all values agree, 1 when some differ (the alert ``feature_skew`` is then open), 3 when
nothing could be checked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from functools import cache

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from cluster.alerts import Alerts
from cluster.clock import Clock, open_clock
from cluster.database import Database
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines import usecases
from pipelines.commands import explained
from pipelines.contracts.events import INSTANT, buckets_of
from pipelines.features.online import OnlineState
from pipelines.features.served import predictions_table
from pipelines.features.skew import SkewReport, audit, columns_of_the_page
from pipelines.features.views import open_views
from pipelines.spec import UseCase
from pipelines.spec.base import microseconds
from pipelines.training.artifact import ArtifactError, load
from pipelines.training.registry import fetched

ALERT = "feature_skew"
AGREES, DIFFERS, NOTHING = 0, 1, 3
"""Exit codes; see above."""
_SLOTS = 10_000  # a share is a number of these


def audit_lately(
    use_case: UseCase,
    *,
    tables: Tables,
    database: Database,
    states: Mapping[str, OnlineState],
    clock: Clock,
    columns: Callable[[str], Sequence[str] | None] = columns_of_the_page,
    lately: timedelta = timedelta(hours=24),
    share: float = 0.05,
    rows: int | None = None,
) -> SkewReport:
    """Audits the predictions of the time ``lately`` whose id's hash falls into ``share`` (0 to 1) of all hashes.

    Of more than ``rows`` such a smaller share is audited, so that there are about so many.

    ``states`` and ``columns`` as of ``pipelines.features.skew.audit``.
    Opens the alert ``feature_skew`` when a value differs, and resolves it when some were checked and none does.
    """
    name = predictions_table(use_case)
    if not tables.exists(name):
        return SkewReport(checked=0, mismatched=0, pending=0, foreign=0)
    now = clock.now()
    since, until = (pa.scalar(at, pa.int64()).cast(INSTANT) for at in (now - microseconds(lately), now))
    served = (pc.field("_time") >= since) & (pc.field("_time") <= until)
    # Ids first: all answers of a busy day are too much for a process, all their ids are not.
    ids = tables.read(name, columns=["prediction_id"], filter=served).column("prediction_id")
    slots = round(min(share, (rows or len(ids)) / max(len(ids), 1)) * _SLOTS)
    ids = ids.filter(pc.less(buckets_of(ids, _SLOTS), max(slots, 1)))
    chosen = tables.read(name, filter=served & pc.field("prediction_id").isin(ids.combine_chunks()))
    report = audit(use_case, chosen, tables=tables, states=states, columns=columns)
    alerts = Alerts(database, clock)
    if report.mismatched:
        worst = max(report.by_feature, key=lambda feature: report.by_feature[feature].differing)
        alerts.open(
            ALERT,
            use_case.name,
            f"{report.mismatched} of {report.checked} served vectors are not what their events make again; "
            f"{len(report.by_feature)} features differ, {worst!r} most often: {report.by_feature[worst]}",
        )
    elif report.checked:
        alerts.resolve(ALERT, use_case.name, f"{report.checked} served vectors are what their events make again")
    return report


def fetched_columns(use_case: UseCase, settings: Settings) -> Callable[[str], Sequence[str] | None]:
    """The numeric columns of the versions that this node has fetched, None for any other; for ``audit_lately``."""

    @cache
    def columns(version: str) -> Sequence[str] | None:
        found = fetched(use_case.name, version, settings.cache_dir / "models")
        return None if found is None else load(found).numeric

    return columns


@contextmanager
def _damage_told() -> Iterator[None]:
    """Ends the process with 1 and what to do about a version's copy on this node that is damaged."""
    try:
        yield
    except ArtifactError as error:
        sys.exit(f"tidegate: {error}; delete that copy, and what needs the version fetches it again")


def main(arguments: Sequence[str] | None = None, prog: str = "python -m pipelines.audit") -> int:
    """The job's entry point; settings come from the environment.

    0 when all agree, 1 when some differ, 3 when there was nothing to audit.
    """
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("use_case", choices=usecases.names())
    parser.add_argument("--hours", type=_hours, default=24.0, help="how far back, on the cluster's clock (default 24)")
    parser.add_argument("--share", type=_share, default=0.05, help="of the predictions, above 0, at most 1 (0.05)")
    parser.add_argument("--rows", type=int, help="audit a smaller share, so that there are about so many")
    chosen = parser.parse_args(arguments)
    settings = Settings.from_environment()
    use_case = usecases.load(chosen.use_case)
    with explained(use_case.name), _damage_told():
        database = Database(settings.database_url)
        database.create()
        views = open_views(settings, use_case)
        report = audit_lately(
            use_case,
            tables=Tables(settings.tables_url, settings.storage_options),
            database=database,
            states=views.states,
            clock=open_clock(settings),
            lately=timedelta(hours=chosen.hours),
            share=chosen.share,
            rows=chosen.rows,
            columns=fetched_columns(use_case, settings),
        )
        views.close()
        database.close()
    # orjson writes null for NaN, which json would write as what is no JSON.
    sys.stdout.write(orjson.dumps(asdict(report)).decode() + "\n")
    return DIFFERS if report.mismatched else AGREES if report.checked else NOTHING


def _hours(text: str) -> float:
    hours = float(text)
    if not 0 < hours < 1e6:
        raise argparse.ArgumentTypeError(f"hours are above 0 and below a million, not {text}")
    return hours


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"a share lies above 0 and is at most 1, not {text}")
    return share


if __name__ == "__main__":
    sys.exit(main())
