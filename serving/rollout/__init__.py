"""Releases: a pure state machine, its journal, the judge of its evidence, and the controller that acts."""
