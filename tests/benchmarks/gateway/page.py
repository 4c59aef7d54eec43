"""The use case that is served: ten windowed features of a sensor, two inputs, a network of the usual size.

``__main__`` puts it among the pages of a copy of the code, as ``pipelines/usecases/bench.py``: Serve's replicas find
their use case by its name, as they do in any deployment.
"""

from datetime import timedelta

from pipelines.spec import (
    Contract,
    FeatureView,
    Field,
    FieldType,
    Fold,
    ModelSpec,
    ReleasePolicy,
    Split,
    Target,
    UseCase,
    Window,
)

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
FOLDS = (Fold.COUNT, Fold.MEAN, Fold.MIN, Fold.MAX, Fold.STD)

CONTRACT = Contract(
    name="sensor_readings",
    version="1.0.0",
    owner="benchmarks",
    fields=(
        Field(name="sensor", type=FieldType.STRING, pattern=r"sensor_[0-9]{4}"),
        Field(name="at", type=FieldType.TIMESTAMP),
        Field(name="flow", type=FieldType.FLOAT, minimum=0, maximum=1_000, unit="L/s"),
        Field(name="temperature", type=FieldType.FLOAT, minimum=-40, maximum=55, unit="degC"),
        Field(name="holiday", type=FieldType.BOOLEAN),
    ),
    entity="sensor",
    time="at",
    key=("sensor", "at"),
)

# Hops of a day: the values that the sides are compared by then hold for the length of a run.
VIEW = FeatureView(
    name="sensor_flow",
    windows=(
        Window(field="flow", length=7 * DAY, hop=DAY, folds=FOLDS),
        Window(field="flow", length=28 * DAY, hop=DAY, folds=FOLDS),
    ),
    inputs=("temperature", "holiday"),
    ttl=7 * DAY,
)

USE_CASE = UseCase(
    name="bench",
    title="The benchmark of the gateway",
    contract=CONTRACT,
    view=VIEW,
    model=ModelSpec(
        name="bench",
        target=Target(field="flow", horizon=HOUR),
        numeric=(*VIEW.stored, "temperature", "holiday"),
        categorical=("sensor",),
        anchor="flow_mean_7d",
        split=Split(calibration=DAY, test=DAY),
        hidden=(64, 64),
    ),
    gates=(),
    # The audit that runs every quarter of an hour would fall upon either side by chance.
    release=ReleasePolicy(skew=None),
)
