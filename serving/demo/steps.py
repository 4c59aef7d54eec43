"""The steps of the demo. Each uses the same functions as the jobs, checks what it promises, and returns figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.alerts import Alerts
from cluster.clock import ReplayClock
from cluster.database import Database
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines import samples
from pipelines.backfill import materialize
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import EVENT_ID, SEQUENCE
from pipelines.features import derived
from pipelines.features.served import inputs_of, outcomes_table, predictions_table
from pipelines.features.skew import SkewReport, audit
from pipelines.features.training_table import backfill
from pipelines.features.views import open_views
from pipelines.ingest import LoadReport, ingest
from pipelines.retrain import RetrainReport, retrain
from pipelines.samples.faults import FaultyFile, event_time, write_faulty_files
from pipelines.spec import UseCase
from pipelines.spec.base import DAY_US
from pipelines.train import TrainReport, train
from serving.app import deploy
from serving.auth import owner_key
from serving.client import Client
from serving.demo.release import DRILLS, WITHDRAWN_BY, Releases
from serving.demo.replay import Replay
from serving.demo.report import Size, expect
from serving.demo.retraining import retrain_on_drift
from serving.demo.sensor import sensor_offline
from serving.rollout.machine import Kind

AUDITED = 500
DRAFT_EPOCHS = 1
"""The first champion is a hasty fit of so many epochs, so that the page's own can be seen to be better."""
SERVED_SHARE = 1 / 4
"""Of the held-out stretch, before versions are tried on the rest."""
_TRY_DAYS = 4  # replayed days that a drill may take


@dataclass
class Demo:
    """What the steps share. ``rows`` is the real data, ``start_us`` where history ends and the replay begins."""

    use_case: UseCase
    settings: Settings
    say: Callable[[str], None]
    rows: pa.Table
    start_us: int
    url: str

    def __post_init__(self) -> None:
        self.tables = Tables(self.settings.tables_url, self.settings.storage_options)
        self.database = Database(self.settings.database_url)
        self.database.create()
        self.clock = ReplayClock(self.settings.clock_file)
        self.clock.set(self.start_us)
        self._open = ExitStack()

    @classmethod
    def over(
        cls,
        use_case: UseCase,
        settings: Settings,
        say: Callable[[str], None],
        url: str,
        size: Size,
    ) -> Demo:
        """The last ``replay_days`` are replayed; ``history_days`` before them (all, when None) are history."""
        rows = samples.rows(use_case)
        times = event_time(use_case.contract, rows).to_numpy()
        end = (int(times.max()) // DAY_US + 1) * DAY_US
        start = end - size.replay_days * DAY_US
        if size.history_days is not None:
            rows = rows.filter(pa.array(times >= start - size.history_days * DAY_US))
        return cls(use_case, settings, say, rows, start, url)

    def contract(self) -> dict[str, Any]:
        """History and faulty files through the contract into the events and quarantine tables."""
        contract, folder = self.use_case.contract, self.settings.home / "incoming"
        history = self.rows.filter(pa.array(event_time(contract, self.rows).to_numpy() < self.start_us))
        folder.mkdir(parents=True, exist_ok=True)
        quarters = pc.strftime(history[contract.time], "%Y-%m").to_pylist()
        names = np.array([f"{month[:4]}-q{(int(month[5:]) + 2) // 3}" for month in quarters])
        for name in np.unique(names):
            pq.write_table(history.filter(pa.array(names == name)), folder / f"history-{name}.parquet")
        middle = history.slice(history.num_rows // 2, 400)
        faulty = write_faulty_files(contract, self.use_case.model.target.field, middle, self.start_us, folder)

        report = self._ingest(folder)
        expect(report.status == "published", f"the load was {report.status}, not published")
        expect(
            report.rows_in == report.accepted + report.quarantined,
            f"{report.rows_in} rows came, {report.accepted} + {report.quarantined} are accounted for",
        )
        expect(report.accepted == history.num_rows, f"{report.accepted} of {history.num_rows} good rows accepted")
        for file in faulty:
            self._expect_quarantined(file, report.by_rule)
        again = self._ingest(folder)
        stored = self.tables.read(events_table(self.use_case), columns=[EVENT_ID])
        expect(again.status == "already_published", f"the same load again was {again.status}")
        expect(stored.num_rows == report.accepted, f"{stored.num_rows} rows stored, {report.accepted} accepted")
        return {
            "rows_in": report.rows_in,
            "accepted": report.accepted,
            "quarantined": report.quarantined,
            "rows_per_s": round(report.rows_in / report.seconds),
            "by_rule": dict(report.by_rule),
        }

    def _ingest(self, folder: Path) -> LoadReport:
        return ingest(
            self.use_case,
            [str(folder)],
            tables=self.tables,
            database=self.database,
            settings=self.settings,
            clock=self.clock,
        )

    @staticmethod
    def _expect_quarantined(file: FaultyFile, by_rule: dict[str, int]) -> None:
        found = by_rule.get(file.rule, 0)
        expect(found == file.rows, f"{file.path.name}: {found} rows under {file.rule!r}, {file.rows} expected")

    def features(self) -> dict[str, Any]:
        """The training set, and by the same functions the state from which the gateway answers."""
        done = backfill(self.use_case, tables=self.tables, settings=self.settings)
        state = materialize(
            self.use_case, tables=self.tables, database=self.database, settings=self.settings, clock=self.clock
        )
        return {
            "examples": done.rows,
            "stored_features": len(self.use_case.view.stored),
            "entities": state.entities,
            "events_version": done.events_version,
            "view": done.view_fingerprint,
        }

    def train(self) -> dict[str, Any]:
        """A version in the registry: trained at a pinned snapshot, calibrated, gated."""
        self.trained = self._train(DRAFT_EPOCHS if self.tries_releases else self.use_case.model.epochs)
        done, test = self.trained, self.trained.validation.test
        return {
            "version": done.version,
            "train_rows": done.rows["train"],
            "test_rows": test.rows,
            "test_mae": test.mae,
            "test_median_error": test.mdape,
            "interval_coverage": test.coverage,
            "fit_seconds": done.seconds["fit"],
        }

    @property
    def tries_releases(self) -> bool:
        """Whether the use case's page says all that the steps after the skew audit need."""
        return self.use_case.release.labels is not None and self.use_case.fallback is not None

    def _train(self, epochs: int) -> TrainReport:
        model = self.use_case.model.model_copy(update={"epochs": epochs})
        return train(
            self.use_case.model_copy(update={"model": model}),
            tables=self.tables,
            database=self.database,
            settings=self.settings,
            clock=self.clock,
        )

    def gate(self) -> dict[str, Any]:
        """The version against its baseline on the same rows."""
        figures: dict[str, Any] = {}
        for gate in self.trained.validation.gates:
            expect(gate.passed, f"gate {gate.name!r} did not pass: {gate.reason}")
            figures |= {
                f"{gate.name}_ratio": gate.ratio,
                f"{gate.name}_upper": gate.upper,
                f"{gate.name}_model": gate.model_metric,
                f"{gate.name}_baseline": gate.baseline_metric,
            }
        return figures

    def serve(self) -> dict[str, Any]:
        """The held-out stretch over HTTP, through the client."""
        table = deploy(self.use_case.name, self.settings)
        self.say(f"    version {table.champion} answers at {self.url}/v1/{self.use_case.name}")
        share = SERVED_SHARE if self.tries_releases else 1.0
        self._open_replay()
        began = time.perf_counter()
        done = self.replay.run(round(self.replay.left * share), self.say)
        seconds = time.perf_counter() - began
        self._wait_for_drain()
        expect(done.failed == 0, f"{done.failed} requests failed")
        expect(done.unanswered == 0, f"{done.unanswered} predictions had no value")
        stored = self.tables.read(events_table(self.use_case), columns=[EVENT_ID], filter=pc.field(SEQUENCE) > 0)[
            EVENT_ID
        ].to_pylist()
        expect(
            len(stored) == len(set(stored)) and set(stored) == done.event_ids,
            f"{len(stored)} drained events ({len(set(stored))} distinct), {len(done.event_ids)} acknowledged",
        )
        milliseconds = np.array(done.predict_ms)
        return {
            "moments": done.moments,
            "events": done.events,
            "refused_events": done.refused,
            "predictions": done.predictions,
            "outcomes": done.outcomes,
            **self._accuracy(),
            "interval_coverage": done.covered / max(done.outcomes, 1),
            "request_p50_ms": float(np.median(milliseconds)),
            "request_p99_ms": float(np.quantile(milliseconds, 0.99)),
            "moments_per_s": done.moments / seconds,
        }

    def release(self) -> dict[str, Any]:
        """Versions that err, are slow, answer NaN, are the same and are better, through the rollout controller."""
        releases = Releases(self.use_case, self.settings, self.database, self.replay, self.say)
        self.replay.asks, most = 2, _TRY_DAYS * 24
        figures: dict[str, Any] = {}
        for name, drill in DRILLS.items():
            version = releases.copy_of_champion(drill)
            harmless = drill is None
            done = releases.drive(version, most=most, abort_when=releases.last_step_is_complete if harmless else None)
            wanted = Kind.ABORTED if harmless else Kind.ROLLED_BACK
            expect(done.outcome == wanted, f"the {name} version ended as {done.outcome}: {done.ended.payload}")
            fits = done.guardrail is None if harmless else done.guardrail in WITHDRAWN_BY[name]
            expect(fits, f"the {name} version was withdrawn by {done.guardrail}: {done.ended.payload}")
            # A drill may be over before a request of several instances was sent.
            expect(done.shared > 0 or not harmless, f"no request was answered by both versions: {done.batches} sent")
            figures |= done.figures(name)
        self.replay.asks = 1
        better = self._train(self.use_case.model.epochs)
        expect(better.requested, f"the better version did not pass its gates: {better.validation.text()}")
        done = releases.drive(better.version, most=self.replay.left)
        expect(done.shared > 0, f"no request was answered by both versions: {done.batches} were sent")
        expect(done.outcome == Kind.PROMOTED, f"the better version ended as {done.outcome}: {done.ended.payload}")
        return figures | done.figures("better") | {"better_days": done.days}

    def sensor(self) -> dict[str, Any]:
        """One district's readings stop: answers go on from the fallback ladder, and an alert says so."""
        began = self.clock.now()
        figures = sensor_offline(self.use_case, self.replay, Alerts(self.database, self.clock), self.say)
        self._wait_for_drain()
        logged = self.tables.read(predictions_table(self.use_case))
        report = self._audit(logged.filter(pc.greater(logged["_time"].cast(pa.int64()), began)))
        return figures | {"audited": report.checked, "imputed": report.imputed, "mismatched": report.mismatched}

    def retrain(self) -> dict[str, Any]:
        """Drift opens a trigger: search, training, gates, release request, rollout."""
        self._wait_for_drain()
        releases = Releases(self.use_case, self.settings, self.database, self.replay, self.say)
        return retrain_on_drift(
            self.use_case,
            self.replay,
            releases,
            self._retrain,
            self.database,
            Alerts(self.database, self.clock),
            self.say,
        )

    def _retrain(self) -> RetrainReport:
        self._wait_for_drain()
        return retrain(
            self.use_case,
            tables=self.tables,
            database=self.database,
            settings=self.settings,
            clock=self.clock,
        )

    def skew(self) -> dict[str, Any]:
        """Logged predictions recomputed offline from what was known then, bit for bit."""
        logged = self.tables.read(predictions_table(self.use_case))
        rng = np.random.default_rng(0)
        chosen = np.sort(rng.choice(logged.num_rows, min(AUDITED, logged.num_rows), replace=False))
        report = self._audit(logged.take(chosen))
        return {
            "checked": report.checked,
            "mismatched": report.mismatched,
            "values": report.checked * (len(self.use_case.view.stored) + len(self.use_case.model.numeric)),
        }

    def close(self) -> None:
        """Ends what the replay holds."""
        self._open.close()

    def _audit(self, logged: pa.Table) -> SkewReport:
        views = open_views(self.settings, self.use_case)
        report = audit(self.use_case, logged, tables=self.tables, states=views.states)
        views.close()
        expect(report.mismatched == 0, f"{report.mismatched} of {report.checked} vectors differ: {report.by_feature}")
        return report

    def _open_replay(self) -> None:
        key = owner_key(self.settings)
        client = self._open.enter_context(Client(self.use_case.name, url=self.url, api_key=key))
        caller = self._open.enter_context(Client(self.use_case.name, url=self.url, api_key=key, retries=0))
        self.replay = Replay(self.use_case, self.rows, self.start_us, self.clock, client, caller)
        self._open.callback(self.replay.close)

    def _wait_for_drain(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            status = self.replay.client.status()
            if not any(stream["pending"] for stream in status["log"].values()):
                return
            expect(time.monotonic() < deadline, f"the log was not drained within 60 s: {status}")
            time.sleep(0.2)

    def _accuracy(self) -> dict[str, float]:
        """Mean absolute error of the answers and of the gates' baseline, on the matured outcomes."""
        outcomes = self.tables.read(outcomes_table(self.use_case))
        logged = self.tables.read(predictions_table(self.use_case))
        place = pc.index_in(outcomes["prediction_id"], value_set=logged["prediction_id"].combine_chunks())
        expect(place.null_count == 0, f"{place.null_count} outcomes name a prediction that was not logged")
        logged, actual = logged.take(place), outcomes["value"].to_numpy()
        stored = np.array(logged["stored"].to_pylist(), dtype=np.float64)
        times = logged["_time"].cast(pa.int64()).to_numpy()
        columns = derived.columns(self.use_case.view, stored, inputs_of(self.use_case, logged), times)
        model = float(np.mean(np.abs(logged["value"].to_numpy() - actual)))
        baseline = float(np.nanmean(np.abs(columns[self.use_case.gates[0].baseline] - actual)))
        return {"mae": model, "baseline_mae": baseline, "mae_ratio": model / baseline}
