"""Settings that contradict one another: the few of which it is certain. A setting with no effect is a fault."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import ErrorDetails

from qtune.data.formats import FORMATS
from qtune.model import lora_inits
from qtune.recipe.data_files import TABLES_SUFFIXES, files_of
from qtune.recipe.error_messages import Fault, dotted, shown
from qtune.recipe.paths import SOURCES
from qtune.recipe.toml_reader import Key
from qtune.train.objectives import OBJECTIVES
from qtune.train.optimizers import OPTIMIZERS, Optimizer

BASE, REVISION = ("model", "base"), ("model", "revision")
TRUST_REMOTE_CODE, COMMIT = ("model", "trust_remote_code"), re.compile(r"[0-9a-f]{40}")
QUANTIZATION, DOUBLE_QUANTIZATION = ("model", "quantization"), ("model", "double_quantization")
TRAIN, TRAIN_SPLIT, SUBSET = ("data", "train"), ("data", "train_split"), ("data", "subset")
HELD_OUT, HELD_OUT_SPLIT = ("data", "held_out"), ("data", "held_out_split")
HELD_OUT_FRACTION = ("data", "held_out_fraction")
NO_ROWS = ErrorDetails(type="missing", loc=TRAIN, msg="", input=None)

START_FROM, INIT, TRAIN_TOKENS = ("lora", "start_from"), ("lora", "init"), ("lora", "train_tokens")
CANARIES, CANARY_REPEATS = ("evaluate", "canaries"), ("evaluate", "canary_repeats")
METRIC, ROWS = ("evaluate", "metric"), ("evaluate", "rows")
OBJECTIVE, BETA = ("train", "objective"), ("train", "beta")
FORMAT, ON_LONG = ("data", "format"), ("data", "on_long")
OF_PAIRS = (("data", "columns", "chosen"), ("data", "columns", "rejected"))
PAIRED = tuple(name for name, each in OBJECTIVES.items() if each.learns_pairs)
OPTIMIZER, SCHEDULE = ("train", "optimizer"), ("train", "schedule")
ONLY_WITH_SCHEDULE = {("train", "decay_fraction"): "wsd", ("train", "cycles"): "cosine_restarts"}
FLOOR_FRACTION = ("train", "floor_fraction")
KEEP_LAYERS, HEAD = ("memory", "keep_layers"), ("memory", "head")
ELSEWHERE = {("memory", "stream_layers"): "streamed", ("memory", "shard_layers"): "in parts"}  # and so recomputed


@dataclass(frozen=True)
class Idle:
    """A setting that has no effect because of another one."""

    key: Key
    because_of: Key
    reason: str

    @property
    def fault(self) -> Fault:
        return self.key, f"{dotted(self.key)} has no effect {self.reason}. Leave it out."


def value_of(values: dict[str, Any], key: Key) -> Any:
    """The value of a setting as written; None where it is not."""
    found: Any = values
    for part in key:
        if isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            found = found.get(part) if isinstance(found, dict) else None
    return found


def keys_of_sources(values: dict[str, Any]) -> list[Key]:
    """Of each [[data.sources]] table."""
    tables = value_of(values, SOURCES)
    return [(*SOURCES, str(number)) for number in range(len(tables))] if isinstance(tables, list) else []


def names_no_rows(values: dict[str, Any]) -> bool:
    """Whether [data] names nothing to train on; where there is no such table that is another fault."""
    data = values.get("data")
    return isinstance(data, dict) and data.get("train") is None and data.get("sources") is None


def idle(values: dict[str, Any]) -> Iterator[Idle]:
    """Every setting that is written and has no effect. File names must be absolute already."""
    base, train, held_out = (value_of(values, key) for key in (BASE, TRAIN, HELD_OUT))
    candidates = []
    if value_of(values, QUANTIZATION) == "none":
        candidates.append(Idle(DOUBLE_QUANTIZATION, QUANTIZATION, 'with model.quantization = "none"'))
    if base == "demo" or _is_file(base):
        candidates.append(Idle(REVISION, BASE, "on a base that is not from the hub"))
    if _is_file(train):
        candidates.append(Idle(TRAIN_SPLIT, TRAIN, "on a file, which has no splits"))
    if held_out is None:
        candidates.append(Idle(HELD_OUT_SPLIT, HELD_OUT, "without data.held_out"))
    else:
        candidates.append(Idle(HELD_OUT_FRACTION, HELD_OUT, "beside data.held_out"))
    if _is_file(held_out):
        candidates.append(Idle(HELD_OUT_SPLIT, HELD_OUT, "on a file, which has no splits"))
    if not any(map(_has_subsets, (train, train if held_out is None else held_out))):
        candidates.append(Idle(SUBSET, TRAIN, "on files other than SQLite databases and workbooks"))
    if value_of(values, ROWS) == 0 and value_of(values, METRIC) != "none":
        candidates.append(Idle(METRIC, ROWS, "with evaluate.rows = 0, which answers nothing"))
    if value_of(values, OBJECTIVE) in (None, "sft"):
        candidates += [
            Idle(key, OBJECTIVE, 'with train.objective = "sft", which learns one answer of a row')
            for key in (BETA, *OF_PAIRS)
        ]
    optimizer = _optimizer(values)
    schedule = value_of(values, SCHEDULE) or (optimizer and optimizer.schedule)
    for key, needed in ONLY_WITH_SCHEDULE.items():
        if schedule != needed:
            candidates.append(Idle(key, SCHEDULE, f'without train.schedule = "{needed}"'))
    if schedule == "constant":
        candidates.append(Idle(FLOOR_FRACTION, SCHEDULE, 'with train.schedule = "constant", which does not fall'))
    if value_of(values, START_FROM) is not None:
        candidates.append(Idle(INIT, START_FROM, "with lora.start_from, whose adapter has begun already"))
    if not value_of(values, CANARIES):
        candidates.append(Idle(CANARY_REPEATS, CANARIES, "without evaluate.canaries"))
    candidates += _idle_in_sources(values)
    return (candidate for candidate in candidates if value_of(values, candidate.key) is not None)


def _idle_in_sources(values: dict[str, Any]) -> Iterator[Idle]:
    sources = keys_of_sources(values)
    for source in sources:
        train = value_of(values, (*source, "train"))
        if _is_file(train):
            yield Idle((*source, "train_split"), (*source, "train"), "on a file, which has no splits")
        if not _has_subsets(train):
            yield Idle((*source, "subset"), (*source, "train"), "on files other than SQLite databases and workbooks")
        if value_of(values, HELD_OUT) is not None:
            yield Idle((*source, "held_out_fraction"), HELD_OUT, "beside data.held_out")
        if len(sources) == 1:
            yield from (Idle((*source, name), SOURCES, "on the only source") for name in ("share", "weight"))


def of_sources(values: dict[str, Any]) -> Iterator[Fault]:
    """What is wrong with [[data.sources]] beside [data], and beside one another."""
    keys = keys_of_sources(values)
    if not keys:
        if value_of(values, SOURCES) == [] and value_of(values, TRAIN) is None:
            yield (
                SOURCES,
                "data.sources is empty, so there is nothing to train on. Write a [[data.sources]] table.",
            )
        return
    if value_of(values, TRAIN) is not None:
        yield (
            TRAIN,
            "data.train is there beside data.sources, and rows come from one or the other. Make it a [[data.sources]]"
            " table of its own, or leave it out.",
        )
    for key in keys:
        if None not in (value_of(values, (*key, "share")), value_of(values, (*key, "max_rows"))):
            yield (
                (*key, "share"),
                f"{dotted((*key, 'share'))} and max_rows both say how much of this source is taken. Leave one out.",
            )
    shares = [value_of(values, (*key, "share")) for key in keys]
    given = [each for each in shares if isinstance(each, int | float)]
    if len(given) < len(shares) and sum(given) >= 1:
        yield (
            next((*key, "share") for key, share in zip(keys, shares, strict=True) if share in given),
            f"The shares of data.sources sum to {sum(given):g}, which leaves nothing for those that have none. Lower"
            " them, or give each source one.",
        )
    yield from _unlike_weights(values, keys)
    yield from _same_files(values, keys)


def _unlike_weights(values: dict[str, Any], keys: list[Key]) -> Iterator[Fault]:
    """What does not go with tokens that count for more or less than one."""
    weighs = next(((*key, "weight") for key in keys if value_of(values, (*key, "weight")) is not None), None)
    objective = value_of(values, OBJECTIVE)
    if weighs is not None and objective in PAIRED:
        yield (
            weighs,
            f"{dotted(weighs)} does not go with train.objective = {shown(objective)}, of whose loss every pair is as"
            " large a part. Leave it out; a share says how much of each source is read.",
        )
    if weighs is not None and value_of(values, TRAIN_TOKENS):
        yield (
            TRAIN_TOKENS,
            f"lora.train_tokens does not go with {dotted(weighs)}: rows of the head are trained by the mean over tokens"
            " alone. Leave one out.",
        )


def _same_files(values: dict[str, Any], keys: list[Key]) -> Iterator[Fault]:
    """A file, or a part of a hub dataset, that two sources read, or one and data.held_out."""
    readers: dict[tuple[str, ...], Key] = {}
    for key in [*((*key, "train") for key in keys), HELD_OUT]:
        read = _read_by(values, key)
        twice = next((each for each in read if each in readers), None)
        if twice is not None:
            yield key, f"{dotted(key)}: {shown(twice[0])} is read by {dotted(readers[twice])} already. Leave one out."
        readers |= dict.fromkeys(read, key)


def _read_by(values: dict[str, Any], key: Key) -> list[tuple[str, ...]]:
    """Each file that a setting names, or the hub dataset, with which part of it is read."""
    name, split_key, default = value_of(values, key), "train_split", "train"
    if key == HELD_OUT:
        split_key, default = "held_out_split", "test"
    if not isinstance(name, str):
        return []
    subset, split = (
        value_of(values, (*key[:-1], each)) or value_of(values, ("data", each)) for each in ("subset", split_key)
    )
    if _is_file(name):
        return [(os.path.realpath(path), str(subset)) for path in files_of(Path(name))]
    return [(name, str(subset), str(split or default))]


def same_rows(values: dict[str, Any]) -> Iterator[Fault]:
    """A held-out source that is the training source."""
    train, held_out = value_of(values, TRAIN), value_of(values, HELD_OUT)
    splits = (value_of(values, TRAIN_SPLIT) or "train", value_of(values, HELD_OUT_SPLIT) or "test")
    if train is not None and train == held_out and (_is_file(train) or splits[0] == splits[1]):
        yield (
            HELD_OUT,
            f"data.held_out is what data.train names, {shown(train)}, so nothing would be held out."
            " Name other rows, or leave it out to hold out data.held_out_fraction of the training rows.",
        )


def exclude_each_other(values: dict[str, Any]) -> Iterator[Fault]:
    """Settings that are asked for together and cannot be."""
    if value_of(values, START_FROM) is not None and value_of(values, TRAIN_TOKENS):
        yield (
            TRAIN_TOKENS,
            "lora.train_tokens and lora.start_from exclude each other: an adapter to start from has no rows of tokens."
            " Leave one of them out.",
        )
    keep = value_of(values, KEEP_LAYERS)
    for key, how in ELSEWHERE.items():
        count = value_of(values, key)
        if isinstance(count, int) and count > 0 and isinstance(keep, int) and keep > 0:
            yield (
                key,
                f"{'.'.join(key)} = {count} and memory.keep_layers = {keep} exclude each other: a layer that is"
                f" {how} has to be recomputed. Leave one of them out.",
            )
    if value_of(values, HEAD) == "nf4" and value_of(values, QUANTIZATION) == "none":
        yield (
            HEAD,
            'memory.head = "nf4" would quantise the head of a base that model.quantization = "none" keeps whole. Leave'
            " one of them out.",
        )


def starts_otherwise(values: dict[str, Any]) -> Iterator[Fault]:
    """A setting with which what is asked for in lora.init cannot be."""
    for init, (key, value, why) in lora_inits.excluded(values):
        yield (
            INIT,
            f"lora.init = {shown(init)} and {dotted(key)} = {shown(value)} exclude each other: {why}. Leave one of them"
            " out.",
        )


def unlike_rows(values: dict[str, Any]) -> Iterator[Fault]:
    """What does not go with pairs of answers where those are learned, and with single ones elsewhere."""
    objective, form = value_of(values, OBJECTIVE) or "sft", value_of(values, FORMAT)
    in_pairs, named = objective in PAIRED, f"train.objective = {shown(objective)}"
    known = FORMATS.get(form) if isinstance(form, str) else None
    if known is not None and known.is_pairs != in_pairs:
        would = " and ".join(shown(name) for name, each in FORMATS.items() if each.is_pairs)
        learns = f"from pairs of answers, which {would} reads" if in_pairs else "one answer of a row"
        instead = "" if in_pairs else f" Of pairs, {' and '.join(map(shown, PAIRED))} learn."
        yield FORMAT, f"data.format = {shown(form)} does not go with {named}, which learns {learns}.{instead}"
    if in_pairs and value_of(values, ON_LONG) == "truncate":
        yield (
            ON_LONG,
            f'data.on_long = "truncate" does not go with {named}: a preference that is cut is another one. "drop"'
            " leaves long pairs out; data.max_tokens is for both answers together.",
        )
    if in_pairs and value_of(values, TRAIN_TOKENS):
        yield (
            TRAIN_TOKENS,
            f"lora.train_tokens does not go with {named}: rows of the head are trained by the mean over tokens alone."
            ' Leave it out, or train them first, with train.objective = "sft".',
        )
    init = value_of(values, INIT)
    begins = lora_inits.LORA_INITS.get(init) if isinstance(init, str) else None
    if in_pairs and begins is not None and begins.changes_answers:
        yield (
            INIT,
            f"lora.init = {shown(init)} does not go with {named}: the model would not begin as the base that it is"
            " measured against. Leave it out.",
        )
    if in_pairs and OBJECTIVES[objective].has_reference and value_of(values, START_FROM) is not None:
        yield (
            START_FROM,
            f"lora.start_from does not go with {named}: answers are measured against the base without any adapter, and"
            " the run would not begin there. `qtune merge` the adapter, and take what it writes as model.base.",
        )
    if in_pairs and value_of(values, CANARIES):
        yield CANARIES, f"evaluate.canaries does not go with {named}: planted rows are no pairs. Leave it out."


def with_optimizer(values: dict[str, Any]) -> Iterator[Fault]:
    """What the optimizer cannot be beside."""
    optimizer = _optimizer(values)
    if optimizer is not None:
        yield from optimizer.refuses(lambda name: value_of(values, tuple(name.split("."))))


def _optimizer(values: dict[str, Any]) -> Optimizer | None:
    """The one that is named, where there is one of that name."""
    return OPTIMIZERS.get(str(value_of(values, OPTIMIZER)))


def unpinned_code(values: dict[str, Any]) -> Iterator[Fault]:
    """Code from the hub that nobody can have read: a branch or a tag is another program whenever its owner wants.

    The code of a local folder is what lies there, and needs no revision.
    """
    base, revision = value_of(values, BASE), value_of(values, REVISION)
    if value_of(values, TRUST_REMOTE_CODE) is not True or base in (None, "demo") or _is_file(base):
        return
    if not isinstance(revision, str) or not COMMIT.fullmatch(revision):
        found = "there is none" if revision is None else f"it is {shown(revision)}"
        yield (
            TRUST_REMOTE_CODE,
            "model.trust_remote_code = true runs code from the hub, so model.revision must be the commit you have read,"
            f" 40 of 0-9 and a-f, and {found}. Add it, or name a local folder.",
        )


def _has_subsets(source: Any) -> bool:
    return not _is_file(source) or source.lower().endswith(TABLES_SUFFIXES)


def _is_file(source: Any) -> bool:
    return isinstance(source, str) and os.path.isabs(source)
