"""From rows to a gated model version: contracts, features, training, validation."""
