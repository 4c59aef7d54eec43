"""PropStackX: the price of a home at its sale, from its features and the recent sales of its area."""

from datetime import timedelta

import numpy as np

from pipelines.spec import (
    Calendar,
    Contract,
    DecayRule,
    Derived,
    Distribution,
    DriftRule,
    FeatureView,
    Field,
    FieldType,
    Fold,
    Freshness,
    Gate,
    Labels,
    ModelSpec,
    Neighbours,
    ReleasePolicy,
    RetrainPolicy,
    Rule,
    SearchSpace,
    Severity,
    Split,
    Target,
    UseCase,
    Volume,
    Window,
)

DAY = timedelta(days=1)

CONTRACT = Contract(
    name="home_sales",
    version="1.1.0",
    owner="valuation",
    description="Recorded sales of homes in Seattle.",
    fields=(
        Field(name="sale_id", type=FieldType.STRING, pattern=r"[0-9]{4}\.\.[0-9]+", example="2016..17"),
        Field(name="area", type=FieldType.STRING, pattern=r"area_[0-9]{1,3}", example="area_12"),
        Field(name="sold_at", type=FieldType.TIMESTAMP),
        Field(name="price", type=FieldType.FLOAT, minimum=10_000, maximum=50_000_000, unit="USD"),
        Field(name="home_type", type=FieldType.STRING, allowed=("sfr", "townhouse")),
        Field(name="living_area", type=FieldType.FLOAT, minimum=100, maximum=50_000, unit="sqft"),
        Field(name="lot_area", type=FieldType.FLOAT, minimum=100, maximum=10_000_000, unit="sqft"),
        Field(name="bedrooms", type=FieldType.INTEGER, minimum=0, maximum=40),
        Field(name="bathrooms", type=FieldType.FLOAT, minimum=0, maximum=40),
        Field(name="grade", type=FieldType.INTEGER, minimum=1, maximum=13),
        Field(name="age", type=FieldType.INTEGER, minimum=0, maximum=300, unit="years"),
        Field(name="effective_age", type=FieldType.INTEGER, minimum=0, maximum=300, unit="years"),
        Field(name="waterfront", type=FieldType.BOOLEAN),
        Field(name="longitude", type=FieldType.FLOAT, minimum=-180, maximum=180, unit="deg"),
        Field(name="latitude", type=FieldType.FLOAT, minimum=-85, maximum=85, unit="deg"),
    ),
    entity="area",
    time="sold_at",
    key=("sale_id",),
    delay=DAY,
    lateness=30 * DAY,
    rules=(
        Rule(
            name="renewed_once_built",
            check="effective_age <= age",
            severity=Severity.WARN,
            description="a home is not renewed before it is built",
        ),
        Rule(
            name="price_of_its_size",
            check="20 <= price / living_area <= 2500",
            severity=Severity.WARN,
            description="the price of a square foot is that of no home: one of the two is wrong",
        ),
    ),
    load_rules=(
        Volume(history=8, ratio=(0.25, 4), severity=Severity.WARN),
        Freshness(max_age=45 * DAY, severity=Severity.WARN),
        Distribution(field="price", mean=(200_000, 2_000_000), severity=Severity.WARN),
    ),
)


def area_value(price_mean_360d, living_area_mean_360d, living_area):
    # What the area paid per square foot in the past year, times this home's size.
    return price_mean_360d / living_area_mean_360d * living_area


def anchor_value(price_mean_360d, living_area_mean_360d, living_area, price_count_360d):
    # An area without sales in the past year: a flat price per square foot, corrected by the network.
    value = price_mean_360d / living_area_mean_360d * living_area
    return np.where(np.greater(price_count_360d, 0), value, 250.0 * living_area)


def comparables(near_price_mean, near_living_area_mean, price_mean_360d, living_area_mean_360d):
    # What the nearest comparable sales paid per square foot, against their area.
    return np.log((near_price_mean / near_living_area_mean) / (price_mean_360d / living_area_mean_360d))


def log_living(living_area):
    return np.log(living_area)


def log_lot(lot_area):
    return np.log(lot_area)


def relative_size(living_area, living_area_mean_360d):
    return np.log(living_area / living_area_mean_360d)


def momentum(price_mean_90d, price_mean_360d):
    return np.log(price_mean_90d / price_mean_360d)


def area_spread(price_std_360d, price_mean_360d):
    return price_std_360d / price_mean_360d


def activity(price_count_90d):
    return np.log1p(price_count_90d)


def year_sin(yearday):
    return np.sin(yearday * (2 * np.pi / 365.25))


def year_cos(yearday):
    return np.cos(yearday * (2 * np.pi / 365.25))


DERIVED = (
    area_value, anchor_value, comparables, log_living, log_lot, relative_size, momentum, area_spread, activity,
    year_sin, year_cos,
)  # fmt: skip

VIEW = FeatureView(
    name="area_sales",
    windows=(
        Window(field="price", length=90 * DAY, hop=DAY, folds=(Fold.COUNT, Fold.MEAN)),
        Window(field="price", length=360 * DAY, hop=10 * DAY, folds=(Fold.COUNT, Fold.MEAN, Fold.STD)),
        Window(field="living_area", length=360 * DAY, hop=10 * DAY, folds=(Fold.MEAN,)),
    ),
    neighbours=(
        Neighbours(
            name="near", k=10, within=360 * DAY, radius=2_000, match=("home_type",), similar=(("living_area", 1.5),),
            fields=("price", "living_area"), folds=(Fold.MEAN,),
        ),
    ),
    inputs=(
        "home_type", "living_area", "lot_area", "bedrooms", "bathrooms", "grade", "age", "effective_age",
        "waterfront", "longitude", "latitude",
    ),
    calendar=Calendar(zone="America/Los_Angeles", parts=("yearday", "days")),
    derived=tuple(Derived(name=function.__name__, function=function) for function in DERIVED),
    ttl=90 * DAY,
)  # fmt: skip

USE_CASE = UseCase(
    name="prop",
    title="PropStackX: home valuation",
    contract=CONTRACT,
    view=VIEW,
    model=ModelSpec(
        name="prop",
        target=Target(field="price"),
        transform="log",
        numeric=(
            "log_living", "log_lot", "comparables", "relative_size", "momentum", "area_spread", "activity", "bedrooms",
            "bathrooms", "grade", "age", "effective_age", "waterfront", "longitude", "latitude", "year_sin", "year_cos",
            "days",
        ),
        categorical=("area", "home_type"),
        anchor="anchor_value",
        split=Split(calibration=90 * DAY, test=120 * DAY),
        hidden=(64, 64),
        learning_rate=5e-3,
        epochs=20,
        batch_size=256,
    ),
    gates=(Gate(name="beats_area_price", metric="mape", baseline="anchor_value", max_ratio=0.95),),
    release=ReleasePolicy(labels=Labels(days=20, grace=DAY), patience=120 * DAY),
    retraining=RetrainPolicy(
        # A few sales a day, and some days none: a longer window, and a limit that a slow rise of prices reaches.
        decay=DecayRule(metric="mape", days=90, min_days=30, ratio=1.1, outcomes=500, grace=DAY),
        drift=DriftRule(columns=("log_living", "age", "grade"), by_entity=False, days=60),
        max_age=366 * DAY,
        cool_down=30 * DAY,
        search=SearchSpace(
            learning_rate=(2e-3, 5e-3, 1e-2), epochs=(20, 30), weight_decay=(1e-4, 1e-2), trials=3, holdout=120 * DAY
        ),
    ),
)  # fmt: skip
