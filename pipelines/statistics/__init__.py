"""Statistics that judge: bootstrap and, later, sequential tests."""
