"""Rows of a dataset on the Hugging Face hub.

`datasets` takes a second to import and brings pandas along, so it is imported for a dataset and not for a file.
"""

from collections.abc import Iterable
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from qtune import logs
from qtune.errors import DataError, MachineError

TIMEOUT_SECONDS = 10


def load(name: str, split: str, subset: str | None) -> Iterable[dict[str, Any]]:
    """The rows of one split, downloaded once and then taken from the cache.

    Raises DataError for a dataset, subset or split that is not there, MachineError where the hub cannot give it.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    logs.quiet_libraries()
    datasets.disable_progress_bars()
    try:
        if not _answers(name):
            datasets.config.HF_HUB_OFFLINE = True
        return datasets.load_dataset(name, subset, split=split)
    except (HFValidationError, RepositoryNotFoundError, DatasetNotFoundError):
        raise DataError(
            f"{name}: is no file here, and the Hugging Face hub has no such dataset that you may read. Check the"
            " name, or log in with `hf auth login` for one that is private or gated."
        ) from None
    except ValueError as fault:  # an unknown split or subset; datasets names those there are
        raise DataError(f"{name}: {str(fault).splitlines()[0]}") from None
    except Exception as fault:  # the hub, its client and the network fail in as many ways as there are layers
        raise MachineError(
            f"{name}: is no file here, and the Hugging Face hub cannot give it ({type(fault).__name__}). Download it"
            ' where there is a network, and name the local file: train = "rows.jsonl".'
        ) from None


def _answers(name: str) -> bool:
    """Whether the hub does, asked once. Where not, `datasets` is to go to its cache, not through its retries."""
    try:
        HfApi().dataset_info(name, timeout=TIMEOUT_SECONDS)
    except (HFValidationError, RepositoryNotFoundError):
        raise
    except Exception:  # no network, no name service, a proxy, offline mode
        return False
    return True
