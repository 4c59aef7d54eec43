"""Which features, views and model columns are made of which field of a contract."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.features.derived import traces
from pipelines.features.windows import pages
from pipelines.spec import Dimension, FeatureView, UseCase


@dataclass(frozen=True)
class Use:
    """What one view makes of a field: ``columns`` that are made of it, derived ones included, in the view's order.

    ``view`` is the view's fingerprint, by which versions name it.
    """

    field: str
    view: str
    name: str
    columns: tuple[str, ...]


def lineage(use_case: UseCase, dimension: str | None = None) -> tuple[Use, ...]:
    """The uses of every field of the contract, or of that of a ``dimension``, by every view of the page.

    They come in the order of views and fields.

    Entity and time are in every column of a view that is made of events, and the target in what a version learns.
    """
    found = []
    for fingerprint, page in pages(use_case).items():
        parts = [part for part in page.view.dimensions if part.name == dimension]
        contracts = [use_case.contract] if dimension is None else [part.contract for part in parts]
        for field in (field for contract in contracts for field in contract.fields):
            direct = _of_events(page, field.name) if dimension is None else _of_dimension(parts[0], field.name)
            columns = _with_derived(page, direct)
            if columns:
                found.append(Use(field.name, fingerprint, page.view.name, columns))
    return tuple(found)


def _of_dimension(dimension: Dimension, field: str) -> set[str]:
    if field in (dimension.contract.entity, dimension.contract.time):
        return set(dimension.features)
    return {f"{dimension.name}_{field}"} & set(dimension.features)


def _of_events(page: UseCase, field: str) -> set[str]:
    view, contract = page.view, page.contract
    if field in (contract.entity, contract.time):
        direct = {*view.stored, *view.calendar_columns}
    else:
        direct = _direct(view, field)
    if field in view.inputs:
        direct.add(field)
    if field == contract.entity and field in page.model.categorical:
        direct.add(field)
    if field == page.model.target.field:
        direct.add(f"target {field}")
    return direct


def _with_derived(page: UseCase, direct: set[str]) -> tuple[str, ...]:
    view = page.view
    for name, found in traces(view).items():
        if direct.intersection(found.arguments):
            direct.add(name)
    order = (*view.stored, *view.inputs, *view.calendar_columns, *(derived.name for derived in view.derived))
    places = {name: place for place, name in enumerate(order)}
    return tuple(sorted(direct, key=lambda name: (places.get(name, len(order)), name)))


def _direct(view: FeatureView, field: str) -> set[str]:
    """The stored columns of a field that is neither entity nor time."""
    found = {window.feature(fold) for window in view.windows if window.field == field for fold in window.folds}
    found |= {lag.feature for lag in view.lags if lag.field == field}
    for near in view.neighbours:
        if field in near.asked:  # it says who is a neighbour, so all of its features follow from it
            found.update(near.features)
        elif field in near.fields:
            found.update(f"{near.name}_{field}_{fold}" for fold in near.folds)
    for dimension in view.dimensions:
        if field == dimension.key:
            found.update(dimension.features)
    return found
