"""Retraining: conditions that open a trigger, and the cycle that carries it to a release request."""
