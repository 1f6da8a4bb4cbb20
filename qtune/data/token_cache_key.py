"""What tokenised rows follow from, as one SHA-256: content, settings, tokenizer, template, date, and this code."""

import functools
import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Sequence
from datetime import datetime, time
from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerBase

from qtune.data.sources import Source
from qtune.data.tokenize import tokenizer_sha256
from qtune.recipe.schema import Recipe

LIBRARIES = ("transformers", "tokenizers", "jinja2")
DATE = "strftime_now"  # what a template asks transformers for the date with


def key_of(recipe: Recipe, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The key of these rows; None where it cannot be told what they follow from.

    Files go by name and content, so that a folder may move.
    """
    contents = [source.fingerprint() for source in sources]
    tokenizer_facts = _facts_of(tokenizer)
    dates = _dates_written(str(tokenizer.chat_template or ""), datetime.now())
    if tokenizer_facts is None or dates is None or None in contents:
        return None
    names = [Path(source.name).name if source.dataset is None else source.name for source in sources]
    settings = recipe.data.model_dump(mode="json", exclude={"check"}) | {"train": names[0], "held_out": names[1:]}
    planted = [recipe.evaluate.canaries, recipe.evaluate.canary_repeats]
    versions = [platform.python_version(), *map(importlib.metadata.version, LIBRARIES)]
    facts = [contents, settings, planted, recipe.train.seed, tokenizer_facts, dates, versions, _code_sha256()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _facts_of(tokenizer: PreTrainedTokenizerBase) -> list[Any] | None:
    """All that a tokenizer and its template do by; None for one that is a program of its own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer) or not type(tokenizer).__module__.startswith("transformers."):
        return None
    return [
        type(tokenizer).__name__,
        tokenizer_sha256(tokenizer),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        str(tokenizer.chat_template or ""),
        str(getattr(tokenizer, "clean_up_tokenization_spaces", None)),
    ]


def _dates_written(template: str, now: datetime) -> list[str] | None:
    """Today as the template writes it; None where it writes the time, or asks in a way that is not in plain sight."""
    formats = [found[2] for found in re.finditer(DATE + r"\s*\(\s*(['\"])(.*?)\1\s*\)", template)]
    asked = len(re.findall(DATE + r"(?!\s+is\s+(?:not\s+)?defined)", template))
    morning, night = (datetime.combine(now.date(), moment) for moment in (time.min, time.max))
    written = [morning.strftime(form) for form in formats]
    return written if asked == len(formats) and written == [night.strftime(form) for form in formats] else None


@functools.cache
def _code_sha256() -> str:
    """Of this room's code as it was loaded: who changes how rows are made need not remember that some are kept."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
