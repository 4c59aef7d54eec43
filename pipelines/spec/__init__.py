"""The vocabulary: frozen specifications without Ray and without I/O. Engines read it; it reads no engine."""

from pipelines.spec.abtest import ABTest, Goal, Measure, Variant
from pipelines.spec.contract import Contract, Field, FieldType
from pipelines.spec.fallback import Fallback
from pipelines.spec.features import Calendar, Derived, Dimension, FeatureView, Fold, Lag, Neighbours, Window
from pipelines.spec.model import Gate, ModelSpec, Split, Target
from pipelines.spec.release import (
    AfterWatch,
    Assignment,
    Blackout,
    Budget,
    CanaryStep,
    Labels,
    ReleasePolicy,
    Shadow,
    SkewRule,
)
from pipelines.spec.retraining import DecayRule, DriftRule, RetrainPolicy, SearchSpace
from pipelines.spec.source import EventSource
from pipelines.spec.usecase import UseCase

__all__ = [
    "ABTest",
    "AfterWatch",
    "Assignment",
    "Blackout",
    "Budget",
    "Calendar",
    "CanaryStep",
    "Contract",
    "DecayRule",
    "Derived",
    "Dimension",
    "DriftRule",
    "EventSource",
    "Fallback",
    "FeatureView",
    "Field",
    "FieldType",
    "Fold",
    "Gate",
    "Goal",
    "Labels",
    "Lag",
    "Measure",
    "ModelSpec",
    "Neighbours",
    "ReleasePolicy",
    "RetrainPolicy",
    "SearchSpace",
    "Shadow",
    "SkewRule",
    "Split",
    "Target",
    "UseCase",
    "Variant",
    "Window",
]
