"""What a prediction over HTTP costs: against empty deployments in the same Serve, MLflow's and Feast's servers, and
against itself without a rollout.
"""

USE_CASE = "bench"
PARTS = ("floors", "mlflow", "feast", "rollouts")
PAIRS = 9
"""Single pairs of two-second runs differ by half on a busy machine; fewer than nine are for trying it out."""
