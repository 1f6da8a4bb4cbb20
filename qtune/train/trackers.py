"""Experiment trackers: what `report.to` needs before a run, and how they are set up. Nothing heavy is loaded here."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from qtune.errors import MachineError

DEFAULTS = {  # of their own settings in the environment, for those that are not set there
    "wandb": {
        "WANDB_PROJECT": "qtune",
        "WANDB_CONSOLE": "off",  # it would upload what the terminal shows, rows of the data too
    },
    "mlflow": {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"},  # a server that does not answer is waited for 4 minutes else
}


def make_ready(tracker: str | None) -> None:
    """Settle what `tracker` will do, before it is imported, which is when it reads that.

    Raises MachineError for one whose package is not installed, or that wants someone to log in.
    """
    if tracker is None:
        return
    _refuse_absent(tracker)
    for name, value in DEFAULTS.get(tracker, {}).items():
        os.environ.setdefault(name, value)
    if tracker == "wandb":
        _refuse_logged_out()


@contextmanager
def nobody_to_ask() -> Iterator[None]:
    """No terminal to read from: a tracker that would ask in the middle of a run fails instead."""
    before = sys.stdin
    with open(os.devnull, encoding="utf-8") as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = before


def _refuse_absent(tracker: str) -> None:
    found = find_spec(tracker)
    if found is None or found.origin is None:  # a folder of that name, as wandb leaves one, is no package
        raise MachineError(
            f'report.to = "{tracker}" needs the package {tracker}, which is not installed: pip install {tracker}'
        )


def _refuse_logged_out() -> None:
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
