"""Where a base's files are: in a folder of this machine, or on the hub, which gives the small ones alone too."""

from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from qtune.errors import MachineError, ModelError
from qtune.recipe.schema import Model
from qtune.recipe.text_part import files_without_text

DEMO_BASE = Path(__file__).resolve().parent.parent / "demo_base"
ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]
WEIGHT_FILES, SMALL_FILES = ["*.safetensors"], ["*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md"]


def local_folder(model: Model) -> Path | None:
    """The folder that the recipe names, be it without weights; None for a hub model."""
    if model.base == "demo":
        return DEMO_BASE
    path = Path(model.base)
    return path if path.is_absolute() else None


def whole(model: Model, is_text_alone: bool = True) -> Path:
    """A hub model's folder with its weights, or those files of them that hold some of its text model.

    All here raise ModelError and MachineError where there is none.
    """
    apart = files_without_text(without_weights(model)) if is_text_alone else frozenset()
    return _snapshot(model, [*WEIGHT_FILES, *SMALL_FILES], sorted(apart))


def without_weights(model: Model) -> Path:
    """A hub model's folder with its small files: configuration, tokenizer, chat template."""
    return _snapshot(model, SMALL_FILES)


def adapter_on_hub(name: str, key: str) -> Path:
    """The folder of an adapter on the hub, which the setting `key` names."""
    return Path(_fetched(name, lambda: snapshot_download(name, allow_patterns=ADAPTER_FILES), key))


def config_alone(model: Model) -> Path:
    """A hub model's folder with nothing but config.json in it for certain."""
    return Path(
        _fetched(model.base, lambda: hf_hub_download(model.base, "config.json", revision=model.revision))
    ).parent


def _snapshot(model: Model, patterns: list[str], but: Sequence[str] = ()) -> Path:
    wanted = [*patterns, *(["*.py"] if model.trust_remote_code else [])]
    return Path(
        _fetched(
            model.base,
            lambda: snapshot_download(
                model.base, revision=model.revision, allow_patterns=wanted, ignore_patterns=list(but) or None
            ),
        )
    )


def _fetched(name: str, fetch: Callable[[], str], key: str = "model.base") -> str:
    folder = "base" if key == "model.base" else "adapter"
    try:
        return fetch()
    except RepositoryNotFoundError:
        raise ModelError(
            f"{key}: the hub has no model {name!r} that you may read. Check the name, log in with"
            " `hf auth login` for a gated model, or give a local folder."
        ) from None
    except RemoteEntryNotFoundError:
        raise ModelError(
            f"model.base: {name!r} on the hub has no config.json, so it is no model that transformers loads: GGUF"
            " files or an adapter, perhaps. Name the model that it was made from."
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as fault:
        setting = key.rpartition(".")[2]
        raise MachineError(
            f"{key}: {name!r} is not on this machine and the hub cannot be reached"
            f" ({type(fault).__name__}). Download it where there is a network (`hf download {name}"
            f' --local-dir {folder}`) and write {setting} = "./{folder}", or try this recipe with --demo.'
        ) from None
