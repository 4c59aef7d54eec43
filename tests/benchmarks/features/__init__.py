"""Figures of features: windows, point-in-time joins, online reads and ingest, each against a peer or a floor."""
