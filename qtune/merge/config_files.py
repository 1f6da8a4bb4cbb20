"""What stands beside the weights in a merged folder: configuration, tokenizer, template, stop tokens, licence.

Files are the base's byte for byte, and JSON is edited rather than written anew by transformers: servers trip on
tokenizers and configurations that were serialised again.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtune import atomic_files
from qtune.errors import ModelError
from qtune.merge.safetensors_shards import write_synced
from qtune.model.untrusted_folder import refuse_link_outside
from qtune.recipe import chat_templates
from qtune.recipe.base_kind import INDEX_NAME
from qtune.recipe.schema import Model
from qtune.recipe.text_part import text_config_of

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
LICENCES = ("LICENSE*", "NOTICE*")
COPIED = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", *LICENCES)


def write_small_files(base: Path, output: Path, model: Model, stop_token_ids: Sequence[int], dtype: str) -> None:
    """Fill `output` with everything but weights, for weights stored in `dtype`; every file is on the disk on return.

    Raises ModelError for a configuration that is no JSON object, or a chat template that is not there any more.
    """
    copy_files(base, output, (*COPIED, *(["*.py"] if model.trust_remote_code else [])))
    config = _read(base / CONFIG)
    _edit(output / CONFIG, config, _plain(config, dtype))
    generation = _read(base / GENERATION) if (base / GENERATION).is_file() else {}
    _edit(output / GENERATION, generation, _stopping(generation, config, stop_token_ids))
    if model.chat_template is not None:
        _use_template(output, chat_templates.text_of(model.chat_template))


def copy_files(base: Path, output: Path, patterns: Sequence[str]) -> None:
    """What matches `patterns` in `base`, but for an index of shards, byte for byte, and on the disk on return.

    Raises ModelError for a link that leads out of `base`.
    """
    for path in sorted({path for pattern in patterns for path in base.glob(pattern) if path.is_file()}):
        if path.name != INDEX_NAME:
            refuse_link_outside(path)
            shutil.copyfile(path, output / path.name)
            atomic_files.flush(output / path.name)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise ModelError(f"{path}: is not readable JSON ({fault}).") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object.")
    return value


def _edit(path: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Write `after`, unless the copied file says the same already."""
    if after != before:
        write_synced(path, (json.dumps(after, indent=2, ensure_ascii=False) + "\n").encode())


def _plain(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration of weights that are not quantised and stored in `dtype`, under the key the base uses for it.

    Where it describes more than a text model, it is told of another dtype only where it has one.
    """
    key = "dtype" if "dtype" in config else "torch_dtype"
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    if (text := text_config_of(config)) is None:
        return {**plain, key: dtype}
    plain["text_config"] = _with_dtype(text, dtype)
    return _with_dtype(plain, dtype)


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    return {name: dtype if name in ("dtype", "torch_dtype") and value else value for name, value in config.items()}


def _stopping(generation: dict[str, Any], config: dict[str, Any], stop_token_ids: Sequence[int]) -> dict[str, Any]:
    """Every token the run trained as an end joins the end tokens that are known; the known ones come first."""
    text = text_config_of(config) or config
    known = generation.get("eos_token_id", config.get("eos_token_id", text.get("eos_token_id")))
    ends = known if isinstance(known, list) else [] if known is None else [known]
    missing = [token for token in stop_token_ids if token not in ends]
    if not missing:
        return generation
    ends = [*ends, *missing]
    return {**generation, "eos_token_id": ends if len(ends) > 1 else ends[0]}


def _use_template(output: Path, template: str) -> None:
    """The run's own chat template in both places readers look for one."""
    write_synced(output / chat_templates.FILE, template.encode())
    if (output / TOKENIZER).is_file():
        tokenizer = _read(output / TOKENIZER)
        if "chat_template" in tokenizer:
            _edit(output / TOKENIZER, tokenizer, {**tokenizer, "chat_template": template})
