"""Answers requests and releases models."""
