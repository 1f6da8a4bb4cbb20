"""How qtune behaves in a process that is not its own: while it works the libraries keep quiet and ask no network for
what is on this machine, and afterwards the process is as it was."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qtune import logs
from qtune.fast_imports import settled

if TYPE_CHECKING:
    from qtune.recipe.schema import Recipe

OFFLINE = "HF_HUB_OFFLINE"


def sources(recipe: "Recipe") -> tuple[str | None, ...]:
    """What a run reads: its base, an adapter and its rows, on this machine or by names of the hub."""
    rows = (part.train for part in recipe.data.parts.values())
    return recipe.model.base, recipe.lora.start_from, *rows, recipe.data.held_out


def are_here(*names: str | None) -> bool:
    """Whether bases and rows of these names are on this machine, so that nobody is to be asked for them."""
    return all(name is None or name == "demo" or Path(name).is_absolute() for name in names)


@contextmanager
def at_work(*names: str | None) -> Iterator[None]:
    """While the libraries work for us on what has these names: their messages are kept, and they ask no network for
    what is here."""
    from huggingface_hub import constants

    from qtune.hardware import as_it_was

    before, is_offline = os.environ.get(OFFLINE), constants.HF_HUB_OFFLINE
    with settled(), logs.as_guest(), as_it_was():
        logs.quiet_libraries()
        if are_here(*names):
            os.environ[OFFLINE], constants.HF_HUB_OFFLINE = "1", True
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = is_offline
            if before is None:
                os.environ.pop(OFFLINE, None)
            else:
                os.environ[OFFLINE] = before
