"""The validation report of one model: accuracy on test rows, overall and by entity, and every gate's result.

A model without gates has not passed: nothing was measured against anything.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.validation.gates import GateResult
from pipelines.validation.metrics import Accuracy


@dataclass(frozen=True)
class Report:
    """What validation found. ``intended`` is the coverage that the intervals were calibrated for."""

    test: Accuracy
    by_entity: dict[str, Accuracy]
    gates: tuple[GateResult, ...]
    intended: float

    @property
    def passed(self) -> bool:
        """Whether there is at least one gate and all of them passed."""
        return bool(self.gates) and all(gate.passed for gate in self.gates)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values; a figure that could not be taken is null."""
        document: dict[str, Any] = _without_nan({**asdict(self), "passed": self.passed})
        return document

    def text(self) -> str:
        """A few lines for a person, the worst entity by coverage among them."""
        lines = [
            f"{self.test.rows} test rows: MAE {self.test.mae:.4g}, bias {self.test.bias:+.3g}, "
            f"median error {self.test.mdape:.1%}, coverage {self.test.coverage:.1%} "
            f"(intended {self.intended:.0%})"
        ]
        if self.by_entity:
            worst = min(self.by_entity, key=lambda name: self.by_entity[name].coverage)
            lines.append(f"lowest coverage: {worst} {self.by_entity[worst].coverage:.1%}")
        lines += [f"gate {gate.name}: {'passed' if gate.passed else 'FAILED'}, {gate.reason}" for gate in self.gates]
        return "\n".join(lines if self.gates else [*lines, "no gates: not passed"])


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
