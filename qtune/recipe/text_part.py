"""The part of a checkpoint that is trained: which of its tensors belong to the text model, and what that calls them.

A model that also sees or hears is published as one checkpoint: towers, and a text model under a prefix. Its config.json
describes the text model as `text_config`, and where transformers has a causal language model of that type, that one is
trained and the towers are not read. Heads that guess several tokens ahead (`mtp.*`, or layers behind the last one)
stand in checkpoints of text too, and transformers' classes leave them out.

Nothing here loads torch or transformers.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CONFIG, INDEX_NAME = "config.json", "model.safetensors.index.json"
# How checkpoints call the text model: as transformers 5 writes them, as 4 did, and as Idefics and SmolVLM have it.
INSIDE = re.compile(r"^(?:model\.)?(?:language_model|text_model)\.(?:(?=lm_head\.)|(?:model\.)?(?=(\w)))")
HEAD = "lm_head."
AHEAD = re.compile(r"^(?:model\.)?mtp(?:_\w+)?\.")
LAYER = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class TextPart:
    """`is_within` where towers stand beside the text model; `layers` are the decoder layers that it has, if known."""

    is_within: bool = False
    layers: int | None = None

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> "TextPart":
        """By a config.json."""
        text = text_config_of(described)
        layers = (described if text is None else text).get("num_hidden_layers")
        return cls(text is not None, layers if isinstance(layers, int) else None)

    @classmethod
    def in_folder(cls, folder: Path) -> "TextPart":
        """All of the checkpoint where its config.json cannot be read, for which others have words."""
        return cls.of(json_in(folder / CONFIG))

    def name(self, tensor: str) -> str | None:
        """What the text model calls a tensor of the checkpoint; None for one that is not its own."""
        name = self._without_prefix(tensor) if self.is_within else tensor
        if name is None or AHEAD.match(name):
            return None
        layer = LAYER.match(name)
        return None if layer and self.layers is not None and int(layer[1]) >= self.layers else name

    def _without_prefix(self, tensor: str) -> str | None:
        if tensor.startswith(HEAD):
            return tensor
        prefix = INSIDE.match(tensor)
        if prefix is None:
            return None
        return tensor[prefix.end() :] if prefix[1] is None else f"model.{tensor[prefix.end() :]}"


def files_without_text(folder: Path) -> frozenset[str]:
    """Names of weight files in which, by the index, no tensor is the text model's."""
    shards = json_in(folder / INDEX_NAME).get("weight_map")
    if not isinstance(shards, dict):
        return frozenset()
    part = TextPart.in_folder(folder)
    holding = {file for tensor, file in shards.items() if part.name(tensor) is not None}
    return frozenset(file for file in shards.values() if isinstance(file, str) and file not in holding)


def text_config_of(described: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The settings of the text model in a config.json that describes more, if transformers has a class for it alone;
    None for any other, and where code beside the weights says how the whole is run."""
    text, code = described.get("text_config"), described.get("auto_map")
    if not isinstance(text, Mapping) or (isinstance(code, Mapping) and "AutoModelForCausalLM" in code):
        return None
    kind = text.get("model_type") or f"{described.get('model_type')}_text"
    return text if kind in causal_classes() else None


@lru_cache(maxsize=1)
def causal_classes() -> Mapping[str, str]:
    """The classes that AutoModelForCausalLM makes, by the type of model, read from the source of transformers, whose
    import takes seconds.

    Empty where that is not as it was; `model.base` asks transformers itself, later.
    """
    package = find_spec("transformers")
    if package is None or package.origin is None:
        return {}
    try:
        source = (Path(package.origin).parent / "models/auto/modeling_auto.py").read_text(encoding="utf-8")
    except OSError:
        return {}
    table = re.search(r"^MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = .*?^\)", source, re.DOTALL | re.MULTILINE)
    return dict(_pairs(table[0])) if table else {}


def _pairs(table: str) -> Iterable[tuple[str, str]]:
    return re.findall(r'\(\s*"([^"]+)",\s*"(\w+)"', table)


def json_in(path: Path) -> dict[str, Any]:
    """The JSON object at `path`; an empty one where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
