"""Experiment trackers: a file each. Who adds a file with a `Tracker` in it has added one. Nothing heavy is loaded here.

A tracker is told at arm's length, by `callbacks`: whatever goes wrong in it ends no run.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

from qtune.errors import MachineError
from qtune.registry import registered

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass(frozen=True)
class Tracker:
    """One experiment tracker; `name` is what `report.to` calls it.

    `package` is what it needs installed. `settings` are its own settings in the environment, for those that are not set
    there. `refuse` raises MachineError where it is not ready, such as where nobody is logged in. `callback` makes what
    is told of the beginning, the losses and the end; without one it is transformers' own of that name.
    """

    name: str
    package: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    refuse: Callable[[], None] | None = None
    callback: "Callable[[], TrainerCallback] | None" = None
    order: int = 100  # in the list of them; one of which nothing is said comes last

    def make_ready(self) -> None:
        """Settle what it will do, before it is imported, which is when it reads that.

        Raises MachineError for one whose package is not installed, or that refuses.
        """
        if self.package is not None:
            _refuse_absent(self.name, self.package)
        for name, value in self.settings.items():
            os.environ.setdefault(name, value)
        if self.refuse is not None:
            self.refuse()

    def made(self) -> "TrainerCallback":
        if self.callback is not None:
            return self.callback()
        from transformers.integrations import get_reporting_integration_callbacks

        (theirs,) = get_reporting_integration_callbacks([self.name])
        return theirs()


@contextmanager
def nobody_to_ask() -> Iterator[None]:
    """No terminal to read from: a tracker that would ask in the middle of a run fails instead."""
    before = sys.stdin
    with open(os.devnull, encoding="utf-8") as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = before


def _refuse_absent(name: str, package: str) -> None:
    spec = find_spec(package)
    if spec is None or spec.origin is None:  # a folder of that name, as wandb leaves one, is no package
        raise MachineError(
            f'report.to = "{name}" needs the package {package}, which is not installed: pip install {package}'
        )


TRACKERS = registered(__name__, Tracker)


def make_ready(name: str | None) -> None:
    """Settle what the tracker of that name will do; None is none. Raises what `Tracker.make_ready` does."""
    if name is not None:
        TRACKERS[name].make_ready()
