"""Validation: metrics, gates, report."""
