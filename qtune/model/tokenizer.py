"""The base's tokenizer, which needs neither its weights nor what loads them."""

import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from qtune.errors import ModelError
from qtune.model import base_files, untrusted_folder
from qtune.recipe import chat_templates
from qtune.recipe.schema import Model

MAX_NAMED = 8  # tokens in one message


def has_tokenizer_here(model: Model) -> bool:
    """Whether the base is a folder that holds a tokenizer, which needs no network then."""
    folder = base_files.local_folder(model)
    return folder is not None and any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with the recipe's chat template where it names one; of a hub model no weights are fetched.

    Raises ModelError for a tokenizer or template that cannot be read, and what `base_files` raises.
    """
    folder = base_files.local_folder(model) or base_files.without_weights(model)
    if model.trust_remote_code:
        untrusted_folder.refuse_code_elsewhere(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=_plain_config(folder), trust_remote_code=model.trust_remote_code
        )
    except Exception as fault:  # tokenizer files fail in as many ways as there are formats
        raise ModelError(f"model.base: the tokenizer in {folder} cannot be loaded ({fault}).") from None
    if not tokenizer.chat_template:
        tokenizer.chat_template = _of_processor(folder)
    if model.chat_template is not None:
        tokenizer.chat_template = chat_templates.text_of(model.chat_template)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def _of_processor(folder: Path) -> str | None:
    """The chat template where models that also see keep it, if transformers does not look there for a tokenizer's."""
    for name in ("chat_template.json", "processor_config.json"):
        if isinstance(template := _json_in(folder, name).get("chat_template"), str):
            return template
    return None


def _plain_config(folder: Path) -> PreTrainedConfig | None:
    """What AutoTokenizer needs of config.json where tokenizer_config.json names the class that reads the tokenizer: the
    model's type. None where it needs the configuration of the model's own class, which imports what runs the model
    (transformers 5.17, `utils.type_validators`)."""
    described, tokenizer = (_json_in(folder, name) for name in ("config.json", "tokenizer_config.json"))
    if "model_type" not in described or not tokenizer.get("tokenizer_class") or "auto_map" in tokenizer:
        return None
    asked: dict[str, Any] = {name: described[name] for name in ("model_type", "model_name") if name in described}
    return PreTrainedConfig.from_dict(asked | {"_name_or_path": str(folder)})


def _json_in(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # AutoTokenizer has words for these
        return {}
    return found if isinstance(found, dict) else {}


def trained_ids(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """The ids of lora.train_tokens. Raises ModelError for what is no token of this base."""
    known = tokenizer.get_vocab()
    missing = [token for token in tokens if token not in known]
    if missing:
        special = list(tokenizer.get_added_vocab())
        near = get_close_matches(missing[0], special, n=1)
        hint = f" Did you mean {near[0]}?" if near else f" Its special ones are {', '.join(special[:MAX_NAMED])}."
        raise ModelError(f"lora.train_tokens: {missing[0]!r} is no token of this base.{hint}")
    return [known[token] for token in tokens]
