"""Monitors: what was served, held against what the champion was trained and validated on."""
