"""The buckets of a table that is partitioned by the hash of its entities, and who carries work on them."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from cluster.settings import Settings
from cluster.tables import Tables
from pipelines.contracts.events import BUCKET

Engine = Literal["auto", "arrow", "ray"]


@dataclass(frozen=True)
class Bucket:
    """A bucket of ``rows`` rows; ``source`` is the fingerprint of its data files."""

    number: int
    source: str
    rows: int


def buckets_in(tables: Tables, name: str, version: int) -> list[Bucket]:
    """The buckets that have files in one version of a table, by number.

    Raises ``ValueError`` when the table is not partitioned by bucket.
    """
    held: dict[int, list[tuple[str, int]]] = {}
    for entry in tables.entries(name, version):
        if BUCKET not in entry.partition:
            raise ValueError(f"table {name!r} is not partitioned by {BUCKET!r}: its rows cannot be read by entity")
        held.setdefault(int(entry.partition[BUCKET]), []).append((entry.path, entry.rows))
    buckets = []
    for number, files in sorted(held.items()):
        digest = blake2b("\n".join(path for path, _ in sorted(files)).encode(), digest_size=8)
        buckets.append(Bucket(number, digest.hexdigest(), sum(rows for _, rows in files)))
    return buckets


def ray_carries(engine: Engine, rows: int, settings: Settings) -> bool:
    """Whether Ray carries work on ``rows`` rows: told so, or above ``settings.ray_rows`` where Ray is connected.

    Raises ``RuntimeError`` when it was told so and is not connected.
    """
    if engine == "arrow" or (engine == "auto" and rows <= settings.ray_rows):
        return False
    import ray

    connected = bool(ray.is_initialized())
    if engine == "ray" and not connected:
        raise RuntimeError("engine='ray' needs a Ray cluster: connect first, or use engine='arrow'")
    return connected
