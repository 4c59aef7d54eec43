"""The feature view's engines: folds, state, online and offline computation, skew audit."""
