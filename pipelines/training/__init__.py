"""Training: networks, artifact, data set, fit, registry."""
