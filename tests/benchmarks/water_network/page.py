"""The page of the network: a pressure sensor at every node, which tells of leaks. Its model is never trained."""

from __future__ import annotations

from datetime import timedelta

from pipelines.spec import (
    Contract,
    Derived,
    FeatureView,
    Field,
    FieldType,
    Fold,
    Lag,
    ModelSpec,
    Split,
    Target,
    UseCase,
    Window,
)

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)

CONTRACT = Contract(
    name="pressure_readings",
    version="1.0.0",
    owner="network operations",
    description="Pressure at a node of the network, once a minute.",
    fields=(
        Field(name="node", type=FieldType.STRING, pattern=r"(JUNCTION|TANK|RESERVOIR)-[0-9]{1,5}"),
        Field(name="time", type=FieldType.TIMESTAMP),
        Field(name="pressure", type=FieldType.FLOAT, minimum=-10, maximum=300, unit="m"),
    ),
    entity="node",
    time="time",
    key=("node", "time"),
    lateness=HOUR,
)


def drop(pressure_mean_1h, pressure_mean_1d):
    # A leak shows as an hour below the day's level.
    return pressure_mean_1d - pressure_mean_1h


VIEW = FeatureView(
    name="node_pressure",
    windows=(
        Window(
            field="pressure",
            length=HOUR,
            hop=5 * MINUTE,
            folds=(Fold.COUNT, Fold.LAST, Fold.MEAN, Fold.MIN, Fold.MAX, Fold.STD),
        ),
        Window(field="pressure", length=DAY, hop=HOUR, folds=(Fold.COUNT, Fold.MEAN, Fold.MIN, Fold.STD)),
    ),
    lags=(Lag(field="pressure", offset=DAY, hop=HOUR),),
    derived=(Derived(name="drop", function=drop),),
    ttl=10 * MINUTE,
)

USE_CASE = UseCase(
    name="water_network",
    title="Pressure in a water network",
    contract=CONTRACT,
    view=VIEW,
    model=ModelSpec(
        name="water_network",
        target=Target(field="pressure", horizon=HOUR),
        numeric=("drop", "pressure_std_1h"),
        split=Split(calibration=DAY, test=DAY),
    ),
    gates=(),
)
