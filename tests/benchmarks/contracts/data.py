"""The rows that all sides judge: eight columns, ten rules, clean or with 60 % of the rows broken."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa

from pipelines.contracts.events import INSTANT, to_microseconds
from pipelines.spec import Contract, Field, FieldType

ROWS = 1_000_000
BAD = 0.6
START = datetime(2026, 1, 1, tzinfo=UTC)
NOW_US = to_microseconds(START + timedelta(days=365))
KINDS = ("inlet", "outlet", "mains", "branch", "tank", "valve")

CONTRACT = Contract(
    name="readings",
    version="1.0.0",
    owner="benchmarks",
    fields=(
        Field(name="meter", type=FieldType.STRING),
        Field(name="at", type=FieldType.TIMESTAMP),
        Field(name="flow", type=FieldType.FLOAT, minimum=0, maximum=300),
        Field(name="temperature", type=FieldType.FLOAT, minimum=-40, maximum=55),
        Field(name="humidity", type=FieldType.FLOAT, nullable=True, minimum=0, maximum=100),
        Field(name="count", type=FieldType.INTEGER, minimum=0, maximum=1_000),
        Field(name="kind", type=FieldType.STRING, allowed=KINDS),
        Field(name="code", type=FieldType.STRING, pattern="[A-Z]{2}[0-9]{3}"),
    ),
    entity="meter",
    time="at",
    key=("meter", "at"),
)


def table(rows: int, bad: float, seed: int = 0) -> tuple[pa.Table, np.ndarray]:
    """Rows of which a share ``bad`` breaks one or two of the ten rules, and bool[n] which ones do."""
    draw = np.random.default_rng(seed)
    numbers = {
        "flow": draw.uniform(0, 300, rows),
        "temperature": draw.uniform(-40, 55, rows),
        "humidity": draw.uniform(0, 100, rows),
        "count": draw.integers(0, 1_001, rows),
    }
    kinds, codes = draw.integers(0, len(KINDS), rows), draw.integers(0, 5_000, rows)
    names = [f"{chr(65 + i % 26)}{chr(65 + i // 26 % 26)}{i % 1000:03d}" for i in range(5_000)]
    broken = draw.random(rows) < bad
    for _ in range(2):
        rule = np.where(broken, draw.integers(0, 10, rows), -1)
        for place, (name, low, high) in enumerate(
            (("flow", -1, 301), ("temperature", -41, 56), ("humidity", -1, 101), ("count", -1, 1_001))
        ):
            numbers[name][rule == 2 * place] = low
            numbers[name][rule == 2 * place + 1] = high
        kinds[rule == 8] = len(KINDS)
        codes[rule == 9] = len(names)
    made = pa.table(
        {
            "meter": pa.array([f"m{i}" for i in range(1_000)]).take(pa.array(draw.integers(0, 1_000, rows))),
            "at": pa.array(to_microseconds(START) + np.arange(rows) * 1_000_000).cast(INSTANT),
            "flow": numbers["flow"],
            "temperature": numbers["temperature"],
            "humidity": pa.array(numbers["humidity"], mask=(draw.random(rows) < 0.05) & ~broken),
            "count": numbers["count"],
            "kind": pa.array([*KINDS, "pump"]).take(pa.array(kinds)),
            "code": pa.array([*names, "a-1"]).take(pa.array(codes)),
        }
    )
    return made, broken
