"""The season's normal of every stored feature: what an entity's value usually is at this time of day and year.

Normals are medians over training rows, kept with the model version in one safetensors file and read from it alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pipelines.features.localtime import local_microseconds
from pipelines.spec import Fallback
from pipelines.spec.base import DAY_US

if TYPE_CHECKING:
    from pipelines.training.dataset import Frame

NORMALS = "normals.safetensors"
_FORMAT = "1"
_HOUR = 3_600_000_000
_SIZES = {"hour": 24, "weekend": 2, "month": 12}


class NormalsError(ValueError):
    """A file does not hold normals that this code reads; the message says which."""


@dataclass(frozen=True, eq=False)
class Normals:
    """Normals by entity, slot and stored feature: ``values`` float64[entities, slots, features].

    Slots are the combinations of ``slots`` parts of the local calendar in ``zone``, the first part changing slowest.
    NaN where there were too few rows. ``places`` gives each entity's row.
    """

    zone: str
    slots: tuple[str, ...]
    features: tuple[str, ...]
    places: dict[str, int]
    values: np.ndarray

    def at(self, entities: Sequence[str] | np.ndarray, time_us: np.ndarray) -> np.ndarray:
        """The normals of n entities at n times (us): float64[n, features], NaN for an entity that has none."""
        found = np.full((len(entities), len(self.features)), np.nan)
        rows = np.array([self.places.get(entity, -1) for entity in entities], dtype=np.int64)
        known = rows >= 0
        found[known] = self.values[rows[known], slots_of(self.zone, self.slots, time_us[known])]
        return found

    def save(self, folder: Path) -> None:
        """Write them into ``folder``."""
        page = {"zone": self.zone, "slots": self.slots, "features": self.features, "entities": list(self.places)}
        save_file({"values": self.values}, folder / NORMALS, {"format": _FORMAT, "page": json.dumps(page)})


def read_normals(folder: Path) -> Normals:
    """The normals that ``Normals.save`` wrote into ``folder``; raises ``NormalsError``."""
    path = folder / NORMALS
    try:
        with safe_open(path, framework="np") as file:
            notes, values = file.metadata() or {}, file.get_tensor("values")
    except SafetensorError as error:
        raise NormalsError(f"{path} does not hold normals: {error}") from error
    if notes.get("format") != _FORMAT:
        raise NormalsError(f"{path} has format {notes.get('format')!r}, this code reads {_FORMAT!r}: train again")
    page = json.loads(notes["page"])
    places = {entity: place for place, entity in enumerate(page["entities"])}
    return Normals(page["zone"], tuple(page["slots"]), tuple(page["features"]), places, values)


def slots_of(zone: str, parts: Sequence[str], time_us: np.ndarray) -> np.ndarray:
    """The slot of each time (us, int64[n]) on the local clock of ``zone``, int64[n]."""
    local = local_microseconds(zone, time_us)
    day = local // DAY_US
    slot = np.zeros(len(time_us), np.int64)
    for part in parts:
        if part == "hour":
            place = (local - day * DAY_US) // _HOUR
        elif part == "weekend":
            place = ((day + 3) % 7 >= 5).astype(np.int64)  # 1970-01-01 was a Thursday
        else:
            place = day.astype("datetime64[D]").astype("datetime64[M]").astype(np.int64) % 12
        slot = slot * _SIZES[part] + place
    return slot


def season_normals(policy: Fallback, features: Sequence[str], rows: Frame) -> Normals:
    """The medians of ``features`` (columns of ``rows``) by entity and slot, as ``policy`` describes.

    A value of a coarser slot stands in for each finer one in which a feature has fewer than ``policy.rows`` values.
    """
    names, place = np.unique(rows.entity.astype(str), return_inverse=True)
    columns = np.column_stack([rows.columns[name] for name in features])
    values = np.full((len(names), 1, len(features)), np.nan)
    for depth in range(1, len(policy.slots) + 1):
        parts = policy.slots[:depth]
        size = int(np.prod([_SIZES[part] for part in parts]))
        group = place * size + slots_of(policy.zone, parts, rows.time_us)
        finer = _medians(columns, group, len(names) * size, policy.rows).reshape(len(names), size, -1)
        coarser = np.repeat(values, size // values.shape[1], axis=1)
        values = np.where(np.isnan(finer), coarser, finer)
    places = {str(name): row for row, name in enumerate(names)}
    return Normals(policy.zone, tuple(policy.slots), tuple(features), places, values)


def _medians(columns: np.ndarray, group: np.ndarray, groups: int, rows: int) -> np.ndarray:
    """float64[groups, columns]: medians of the finite values, NaN for a group with fewer than ``rows`` of them."""
    medians = np.full((groups, columns.shape[1]), np.nan)
    for place in range(columns.shape[1]):
        finite = np.isfinite(columns[:, place])
        value, mine = columns[finite, place], group[finite]
        value = value[np.lexsort((value, mine))]
        count = np.bincount(mine, minlength=groups)
        start = np.cumsum(count) - count
        enough = count >= rows
        low, high = (start + (count - 1) // 2)[enough], (start + count // 2)[enough]
        medians[enough, place] = (value[low] + value[high]) / 2
    return medians
