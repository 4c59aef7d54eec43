"""The vocabulary: frozen specifications without Ray and without I/O. Engines read it; it reads no engine."""

from pipelines.spec.contract import Contract, Field, FieldType
from pipelines.spec.features import Calendar, Derived, FeatureView, Fold, Lag, Window
from pipelines.spec.model import Gate, ModelSpec, Split, Target
from pipelines.spec.usecase import UseCase

__all__ = [
    "Calendar",
    "Contract",
    "Derived",
    "FeatureView",
    "Field",
    "FieldType",
    "Fold",
    "Gate",
    "Lag",
    "ModelSpec",
    "Split",
    "Target",
    "UseCase",
    "Window",
]
