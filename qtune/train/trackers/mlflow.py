"""MLflow, by its server or its files."""

from qtune.train.trackers import Tracker

TRACKER = Tracker(
    name="mlflow",
    package="mlflow",
    settings={"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"},  # a server that does not answer is waited for 4 minutes else
    order=4,
)
