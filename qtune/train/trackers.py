"""Experiment trackers: what `report.to` needs to be installed. Nothing heavy is loaded here."""

from importlib.util import find_spec

from qtune.errors import MachineError


def refuse_absent(tracker: str | None) -> None:
    """Raises MachineError for a tracker whose package is not installed."""
    if tracker is None:
        return
    found = find_spec(tracker)
    if found is None or found.origin is None:  # a folder of that name, as wandb leaves one, is no package
        raise MachineError(
            f'report.to = "{tracker}" needs the package {tracker}, which is not installed: pip install {tracker}'
        )
