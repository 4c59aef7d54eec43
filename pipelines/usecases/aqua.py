"""AquaStackX: the inflow of each water district 24 hours ahead, from hourly readings and the weather."""

from datetime import timedelta

import numpy as np

from pipelines.spec import (
    Budget,
    Calendar,
    CanaryStep,
    Contract,
    Derived,
    DriftRule,
    Fallback,
    FeatureView,
    Field,
    FieldType,
    Fold,
    Freshness,
    Gate,
    Labels,
    Lag,
    ModelSpec,
    NullShare,
    ReleasePolicy,
    RetrainPolicy,
    Rule,
    SearchSpace,
    Severity,
    Shadow,
    Silence,
    Split,
    Target,
    UseCase,
    Volume,
    Window,
)

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
AHEAD = 24 * HOUR

CONTRACT = Contract(
    name="district_readings",
    version="1.1.0",
    owner="network operations",
    description="Hourly net inflow of a district with the weather of that hour.",
    fields=(
        Field(name="district", type=FieldType.STRING, pattern=r"dma_[0-9]{1,3}", example="dma_1"),
        Field(name="time", type=FieldType.TIMESTAMP, description="start of the hour"),
        Field(name="inflow", type=FieldType.FLOAT, nullable=True, minimum=0, maximum=300, unit="L/s"),
        Field(name="temperature", type=FieldType.FLOAT, minimum=-40, maximum=55, unit="degC"),
        Field(name="rain", type=FieldType.FLOAT, minimum=0, maximum=200, unit="mm", example=0.0),
        Field(name="humidity", type=FieldType.FLOAT, nullable=True, minimum=0, maximum=100, unit="%"),
        Field(name="windspeed", type=FieldType.FLOAT, nullable=True, minimum=0, maximum=250, unit="km/h"),
        Field(name="holiday", type=FieldType.BOOLEAN),
    ),
    entity="district",
    time="time",
    key=("district", "time"),
    lateness=6 * HOUR,
    rules=(
        Rule(
            name="wet_air",
            check="rain == 0 or humidity >= 30",
            severity=Severity.WARN,
            description="it does not rain out of dry air: one of the two sensors is wrong",
        ),
    ),
    # Deliveries differ, and a history is loaded once and old: what is odd about one is told, and stops nothing.
    load_rules=(
        Volume(history=8, ratio=(0.5, 2), severity=Severity.WARN),
        Freshness(max_age=2 * DAY, severity=Severity.WARN),
        NullShare(field="inflow", maximum=0.25, severity=Severity.WARN),
        Silence(every=3 * HOUR, severity=Severity.WARN),
    ),
)


def last_week(inflow_lag_6d, inflow_mean_7d):
    # The same hour of the same weekday before the target; where it is missing, the week's level.
    return np.where(np.isnan(inflow_lag_6d), inflow_mean_7d, inflow_lag_6d)


def hour_sin(hour):
    return np.sin(hour * (2 * np.pi / 24))


def hour_cos(hour):
    return np.cos(hour * (2 * np.pi / 24))


def year_sin(yearday):
    return np.sin(yearday * (2 * np.pi / 365.25))


def year_cos(yearday):
    return np.cos(yearday * (2 * np.pi / 365.25))


def weekend(weekday):
    return np.greater_equal(weekday, 5) * 1.0


def level_change(inflow_mean_1d, inflow_mean_7d):
    return inflow_mean_1d / inflow_mean_7d - 1.0


def now_to_week(inflow_last_1d, inflow_mean_7d):
    return inflow_last_1d / inflow_mean_7d - 1.0


def spread(inflow_std_7d, inflow_mean_7d):
    return inflow_std_7d / inflow_mean_7d


def day_ago(inflow_lag_1d, inflow_last_1d, inflow_mean_7d):
    return (inflow_last_1d - inflow_lag_1d) / inflow_mean_7d


def week_anchor(last_week, inflow_mean_7d):
    return last_week / inflow_mean_7d - 1.0


def now_against_week(inflow_last_1d, inflow_lag_7d, inflow_mean_7d):
    # How this hour differs from the same hour a week earlier: what last week's pattern misses today.
    return (inflow_last_1d - inflow_lag_7d) / inflow_mean_7d


def two_weeks(inflow_lag_13d, inflow_mean_7d):
    return inflow_lag_13d / inflow_mean_7d - 1.0


def three_weeks(inflow_lag_20d, inflow_mean_7d):
    return inflow_lag_20d / inflow_mean_7d - 1.0


def month_level(inflow_mean_28d, inflow_mean_7d):
    return inflow_mean_28d / inflow_mean_7d - 1.0


def warmer(temperature, temperature_mean_1d):
    return temperature - temperature_mean_1d


DERIVED = (
    last_week, hour_sin, hour_cos, year_sin, year_cos, weekend, level_change, now_to_week, spread, day_ago,
    week_anchor, now_against_week, two_weeks, three_weeks, month_level, warmer,
)  # fmt: skip

VIEW = FeatureView(
    name="district_demand",
    windows=(
        Window(field="inflow", length=DAY, hop=HOUR,
               folds=(Fold.LAST, Fold.MEAN, Fold.MIN, Fold.MAX, Fold.STD, Fold.COUNT)),
        Window(field="inflow", length=7 * DAY, hop=HOUR, folds=(Fold.MEAN, Fold.STD, Fold.COUNT)),
        Window(field="inflow", length=28 * DAY, hop=DAY, folds=(Fold.MEAN, Fold.STD)),
        Window(field="temperature", length=DAY, hop=HOUR, folds=(Fold.MEAN, Fold.MAX)),
        Window(field="rain", length=DAY, hop=HOUR, folds=(Fold.SUM,)),
    ),
    lags=tuple(
        Lag(field="inflow", offset=offset, hop=HOUR) for offset in (DAY, 6 * DAY, 7 * DAY, 13 * DAY, 20 * DAY)
    ),
    inputs=("temperature", "rain", "holiday"),
    calendar=Calendar(zone="Europe/Rome", ahead=AHEAD, parts=("hour", "weekday", "yearday")),
    derived=tuple(Derived(name=function.__name__, function=function) for function in DERIVED),
    ttl=3 * HOUR,
)  # fmt: skip

USE_CASE = UseCase(
    name="aqua",
    title="AquaStackX: water demand by district",
    contract=CONTRACT,
    view=VIEW,
    model=ModelSpec(
        name="aqua",
        target=Target(field="inflow", horizon=AHEAD),
        numeric=(
            "hour_sin", "hour_cos", "year_sin", "year_cos", "weekend", "weekday", "holiday", "level_change",
            "now_to_week", "spread", "day_ago", "week_anchor", "now_against_week", "two_weeks", "three_weeks",
            "month_level", "temperature", "warmer", "rain", "rain_sum_1d",
        ),
        categorical=("district",),
        anchor="last_week",
        scale="inflow_mean_7d",
        split=Split(calibration=timedelta(weeks=6), test=timedelta(weeks=8)),
        hidden=(64, 64),
        learning_rate=1e-2,
    ),
    gates=(Gate(name="beats_last_week", metric="mae", baseline="last_week", max_ratio=0.95),),
    release=ReleasePolicy(
        shadow=Shadow(requests=100, time=HOUR),
        steps=(CanaryStep(weight=0.1, requests=50, time=3 * HOUR), CanaryStep(weight=0.5, requests=200, time=6 * HOUR)),
        labels=Labels(days=7),
        deadline_ms=1000,  # an hourly forecast can wait
        budget=Budget(ms=500, share=0.05),
    ),
    retraining=RetrainPolicy(
        drift=DriftRule(columns=("inflow_mean_1d", "inflow_last_1d", "temperature")),
        cool_down=timedelta(days=14),
        search=SearchSpace(learning_rate=(5e-3, 1e-2, 2e-2), epochs=(8, 12), hidden=((64, 64), (128, 64))),
    ),
    # Held values answer better than normals for as long as yesterday's readings are in the day's window.
    fallback=Fallback(hold=DAY, silence=4 * HOUR, zone="Europe/Rome", slots=("hour", "weekend", "month")),
)  # fmt: skip
