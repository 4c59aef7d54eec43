"""The vocabulary: frozen specifications without Ray and without I/O. Engines read it; it reads no engine."""

from pipelines.spec.abtest import ABTest, Goal, Measure, Variant
from pipelines.spec.contract import Contract, Field, FieldType, Rule, ServiceLevel
from pipelines.spec.fallback import Fallback
from pipelines.spec.features import Calendar, Derived, Dimension, FeatureView, Fold, Lag, Neighbours, Window
from pipelines.spec.loads import (
    Distribution,
    Freshness,
    LoadRule,
    Monotone,
    NullShare,
    References,
    Silence,
    Unique,
    Volume,
)
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
from pipelines.spec.severity import Severity
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
    "Distribution",
    "DriftRule",
    "EventSource",
    "Fallback",
    "FeatureView",
    "Field",
    "FieldType",
    "Fold",
    "Freshness",
    "Gate",
    "Goal",
    "Labels",
    "Lag",
    "LoadRule",
    "Measure",
    "ModelSpec",
    "Monotone",
    "Neighbours",
    "NullShare",
    "References",
    "ReleasePolicy",
    "RetrainPolicy",
    "Rule",
    "SearchSpace",
    "ServiceLevel",
    "Severity",
    "Shadow",
    "Silence",
    "SkewRule",
    "Split",
    "Target",
    "Unique",
    "UseCase",
    "Variant",
    "Volume",
    "Window",
]
