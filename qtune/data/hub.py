"""Rows of a dataset on the Hugging Face hub."""

from collections.abc import Iterable
from typing import Any

from datasets import load_dataset

from qtune.errors import DataError, MachineError


def load(name: str, split: str, subset: str | None) -> Iterable[dict[str, Any]]:
    """The rows of one split, downloaded once. Raises DataError or MachineError that says what would work."""
    try:
        return load_dataset(name, subset, split=split)
    except ValueError as fault:  # an unknown split or subset; datasets names those there are
        raise DataError(f"data.train: {name}: {str(fault).splitlines()[0]}") from None
    except Exception as fault:  # the hub, its client and the network fail in as many ways as there are layers
        raise MachineError(
            f"data.train: {name!r} is no file here, and the hub cannot give it ({type(fault).__name__}). Check the"
            ' name; without a network, download it elsewhere and name the file: train = "rows.jsonl".'
        ) from None
