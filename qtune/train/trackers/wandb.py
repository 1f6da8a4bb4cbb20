"""Weights & Biases, who would ask for a key in the middle of a run."""

import os

from qtune.errors import MachineError
from qtune.train.trackers import Tracker, nobody_to_ask


def refuse_logged_out() -> None:
    """wandb asks for a key once training begins, where it finds none."""
    import wandb

    if os.environ.get("WANDB_MODE", "online") != "online":
        return
    try:
        with nobody_to_ask():
            wandb.login(verify=False)
    except wandb.errors.Error as fault:
        told = str(fault).partition(". ")[0]
        raise MachineError(
            f'report.to = "wandb": nobody is logged in to it here ({told}). Log in with `wandb login`, or set'
            " WANDB_MODE=offline, which keeps what it is told in the folder wandb."
        ) from None


TRACKER = Tracker(
    name="wandb",
    package="wandb",
    settings={
        "WANDB_PROJECT": "qtune",
        "WANDB_CONSOLE": "off",  # it would upload what the terminal shows, rows of the data too
    },
    refuse=refuse_logged_out,
    order=2,
)
