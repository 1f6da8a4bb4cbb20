"""What pydantic finds wrong, in sentences for who wrote the recipe, with the nearest thing that would work."""

import json
import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from qtune.recipe.schema import Recipe
from qtune.recipe.toml_reader import Key

Fault = tuple[Key, str]
"""The setting that a fault is about, and a full sentence."""

OTHER_NAMES = {  # what peft, transformers, trl, unsloth, axolotl, LLaMA-Factory and mlx-lm call it
    "base_model": "base",
    "base_model_name_or_path": "base",
    "model": "base",
    "model_id": "base",
    "model_name": "base",
    "model_name_or_path": "base",
    "model_path": "base",
    "pretrained_model_name_or_path": "base",
    "bits": "quantization",
    "bnb_4bit_quant_type": "quantization",
    "load_in_4bit": "quantization",
    "load_in_8bit": "quantization",
    "bnb_4bit_use_double_quant": "double_quantization",
    "bf16": "compute_dtype",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "dtype": "compute_dtype",
    "fp16": "compute_dtype",
    "torch_dtype": "compute_dtype",
    "template": "chat_template",
    "lora_r": "rank",
    "lora_rank": "rank",
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target": "targets",
    "lora_target_linear": "targets",
    "lora_target_modules": "targets",
    "modules": "targets",
    "target_modules": "targets",
    "init_lora_weights": "init",
    "trainable_token_indices": "train_tokens",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "dataset": "train",
    "dataset_name": "train",
    "datasets": "train",
    "path": "train",
    "train_file": "train",
    "eval_dataset": "held_out",
    "test": "held_out",
    "valid": "held_out",
    "validation": "held_out",
    "validation_file": "held_out",
    "val_set_size": "held_out_fraction",
    "val_size": "held_out_fraction",
    "dataset_text_field": "text",
    "max_samples": "max_rows",
    "cutoff_len": "max_tokens",
    "max_length": "max_tokens",
    "max_seq_len": "max_tokens",
    "max_seq_length": "max_tokens",
    "sequence_len": "max_tokens",
    "sample_packing": "packing",
    "system_prompt": "system",
    "n_epochs": "epochs",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "iters": "max_steps",
    "lr": "learning_rate",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "neftune_noise_alpha": "neftune_alpha",
    "loraplus_lr_ratio": "lora_plus_ratio",
    "min_lr_ratio": "floor_fraction",
    "cosine_min_lr_ratio": "floor_fraction",
    "min_lr_rate": "floor_fraction",
    "num_cycles": "cycles",
    "warmup_ratio": "warmup_fraction",
    "warmup_steps": "warmup_fraction",
    "gradient_clipping": "max_grad_norm",
    "batch_size": "micro_batch",
    "micro_batch_size": "micro_batch",
    "per_device_train_batch_size": "micro_batch",
    "gradient_accumulation_steps": "gradient_accumulation",
    "optim": "optimizer",
    "eval_steps": "eval_every",
    "steps_per_eval": "eval_every",
    "logging_steps": "log_every",
    "steps_per_report": "log_every",
    "random_seed": "seed",
    "random_state": "seed",
    "gradient_checkpointing": "keep_layers",
    "use_gradient_checkpointing": "keep_layers",
    "save_every": "every",
    "save_steps": "every",
    "save_total_limit": "keep",
    "report_to": "to",
    "wandb_project": "to",
}
NAMES_IN_A_TABLE: dict[Key, str] = {  # that belong elsewhere by their letters, and here mean something else
    ("model", "name"): "base",
    ("data", "name"): "train",
}
SAID_ELSEWHERE = {  # what other trainers have settings for, and qtune says elsewhere, or not
    "output_dir": "`qtune run RECIPE --output FOLDER` says where a run goes",
    "modules_to_save": "lora.train_tokens trains rows of the embedding and the head, and no whole module is trained",
    "resume_from_checkpoint": "`qtune resume RUN` goes on with a run",
    "push_to_hub": "`qtune push RUN OWNER/NAME` uploads a run",
    "hub_model_id": "`qtune push RUN OWNER/NAME` uploads a run",
}
TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "model_type": "a table of settings",
    "dict_type": "a table",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "1 to 64 of a-z, 0-9, - and _, with a letter or digit first",
}
BARE = re.compile(r"[A-Za-z0-9_-]+")  # what TOML takes for a key without quotes
LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def explain(errors: Sequence[ErrorDetails], unread: Collection[Key] = ()) -> list[Fault]:
    """A sentence for each error; a setting that is missing because its name is misspelt counts as misspelt only, and
    one that is in the file and could not be read, or its table, as neither."""
    faults: list[Fault] = []
    missing: list[Key] = []
    meant = set(unread)
    for error in errors:
        key = tuple(str(part) for part in error["loc"] if part != "[key]")  # which says that a name is wrong
        if error["type"] == "default_factory_not_called":  # it follows from what is wrong with another setting
            continue
        if error["type"] == "missing":
            missing += _required(key)
        elif error["type"] == "extra_forbidden":
            sentence, near = unknown(key)
            faults.append((key, sentence))
            meant.add(near)
        else:
            faults.append((key, _misfit(key, error)))
    named = {_unnumbered(key) for key in meant}
    unsaid = [
        key for key in missing if not any(_unnumbered(key[:length]) in named for length in range(1, len(key) + 1))
    ]
    return faults + [(key, _missing(key)) for key in unsaid]


def _unnumbered(key: Key) -> Key:
    """The header of a line that is no TOML has the name of a list of tables without the number."""
    return tuple(part for part in key if not part.isdecimal())


def unknown(key: Key) -> tuple[str, Key]:
    """A sentence on a name that is no setting, and the setting that was probably meant (an empty key if none is near).

    Looked for in this order: what the name means in this table, the same name in another table, another library's name
    for one, a near name here, a near name elsewhere.
    """
    *parents, name = key
    here = _fields(tuple(parents))
    elsewhere = [table for table in _tables() if (table[:1] == ("demo",)) == (key[0] == "demo")]
    homes = [table for table in elsewhere if name in _fields(table)]
    says = f"{dotted(key)} is not a setting"
    if is_list(tuple(parents)):
        return f"{says}: {dotted(tuple(parents))} is a list, and {dotted((*parents, '0', name))} is of its first.", ()
    if not here:
        return f"{says}: {dotted(tuple(parents))} is a single value.", ()
    if key in NAMES_IN_A_TABLE:
        return f"{says}. Did you mean {NAMES_IN_A_TABLE[key]}?", (*parents, NAMES_IN_A_TABLE[key])
    if homes:
        return f"{says}: {dotted((name,))} belongs {_in_table(homes[0])}.", (*homes[0], name)
    if name in SAID_ELSEWHERE:
        return f"{says}: {SAID_ELSEWHERE[name]}.", ()
    meant = _meant(name, tuple(parents), elsewhere)
    if meant:
        return f"{says}. Did you mean {meant[-1] if meant[:-1] == key[:-1] else dotted(meant)}?", meant
    place = header(tuple(parents)) if parents else "A recipe"
    return f"{says}. {place} takes {_listed(list(here), 'and')}.", ()


def _meant(name: str, here: Key, elsewhere: Sequence[Key]) -> Key:
    """The setting that a wrong name in the table `here` probably stands for; an empty key where none is near."""
    other = OTHER_NAMES.get(name, "")
    for table in (here, *elsewhere):
        if other in _fields(table) and not _model(_fields(table)[other]):
            return (*table, other)
    for table, cutoff in ((here, 0.6), *((table, 0.8) for table in elsewhere)):
        if near := get_close_matches(name, _fields(table), n=1, cutoff=cutoff):
            return (*table, near[0])
    return ()


def field_of(key: Key) -> FieldInfo | None:
    """The schema's field for a full name; None where there is none. A table of names of the user's own is one field,
    and of a list of tables each has the list's."""
    if key[-1].isdecimal() and is_list(key[:-1]):
        return field_of(key[:-1])
    above = _fields(key[:-2]).get(key[-2]) if len(key) > 1 else None
    return above if above is not None and get_origin(above.annotation) is dict else _fields(key[:-1]).get(key[-1])


def settings() -> dict[str, FieldInfo]:
    """Every setting that is no table, by its dotted name."""
    every = ((*table, name) for table in _tables() for name in _fields(table))
    return {dotted(key): field for key in every if (field := field_of(key)) is not None and not _model(field)}


def dotted(key: Key) -> str:
    """`data.columns.prompt`; a part that TOML would quote is quoted."""
    return ".".join(part if BARE.fullmatch(part) else shown(part) for part in key)


def header(table: Key) -> str:
    """`[data]`, or `[[data.sources]]` for each table of that list, and `[data.sources.columns]` for one in the last."""
    named = dotted(_unnumbered(table))
    return f"[[{named}]]" if table[-1].isdecimal() else f"[{named}]"


def shown(value: Any) -> str:
    """A value as TOML would write it, on one line and cut short."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > 128:
        return "an enormous number"
    if isinstance(value, list):
        text = f"[{', '.join(shown(element) for element in value[:20])}]"
    else:
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _tables(key: Key = ()) -> Iterator[Key]:
    """The recipe itself, as an empty key, and every table in it, outer ones first."""
    yield key
    for name, field in _fields(key).items():
        if _model(field):
            yield from _tables((*key, name))


def _fields(table: Key) -> dict[str, FieldInfo]:
    """What a table may hold, by name; nothing for a key that is no table, such as that of a list of them."""
    model: type[BaseModel] | None = Recipe
    element: type[BaseModel] | None = None
    for part in table:
        field = model.model_fields.get(part) if model else None
        model = _model(field) if field else element if part.isdecimal() else None
        element = _element(field) if field else None
    return model.model_fields if model else {}


def is_list(key: Key) -> bool:
    """Whether a setting is a list of tables, whose names are numbers."""
    field = field_of(key) if key and not key[-1].isdecimal() else None
    return field is not None and _element(field) is not None


def _model(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a table, be it optional."""
    return None if _element(field) else _table_in(field.annotation)


def _element(field: FieldInfo) -> type[BaseModel] | None:
    """The model of the tables of a field that is a list of them."""
    return _table_in(field.annotation) if get_origin(field.annotation) is tuple else None


def _table_in(annotation: Any) -> type[BaseModel] | None:
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _required(key: Key) -> list[Key]:
    """The setting itself, or for a table the settings in it that must be there, which have examples."""
    fields = _fields(key)
    if not fields:
        return [key]
    needed = (name for name, field in fields.items() if field.is_required() or field.examples)
    return [leaf for name in needed for leaf in _required((*key, name))]


def _missing(key: Key) -> str:
    field = field_of(key)
    assert field, "only fields of the schema can be missing"
    assert field.examples, "what is required has an example in the schema"
    return f"{dotted(key)} is missing. Put it {_in_table(key[:-1])}, such as {key[-1]} = {shown(field.examples[0])}."


def _in_table(table: Key) -> str:
    return f"in {header(table)}" if table else "at the top, before the first [table]"


def _misfit(key: Key, error: ErrorDetails) -> str:
    """`lora.rank must be at least 1, and is 0.`, and what to write instead where that is plain."""
    value, choices = error["input"], _choices(key)
    if error["type"] == "model_type":
        instead = _as_table(key, value)
    elif key == ("data", "train") and isinstance(value, list):
        instead = " Several have a [[data.sources]] table each, with a train of its own."
    elif error["type"] == "expected":
        instead = _as_expected(value, error["msg"])
    else:
        instead = _nearest(value, choices) if choices else _same_value(value, error["type"])
    return f"{dotted(key)} must be {_wanted(error, choices)}, and is {shown(value)}.{instead}"


def _as_expected(value: Any, wanted: str) -> str:
    """A number with the unit that is missing, or a text as the list that is wanted."""
    if "a size such as" in wanted and isinstance(value, int | float) and not isinstance(value, bool):
        return f' Did you mean "{value}GiB"?'
    return f" Write [{shown(value)}]." if "a list of" in wanted and isinstance(value, str) else ""


def _as_table(key: Key, value: Any) -> str:
    """The two lines to write where a table was given the one text that it needs."""
    fields = _fields(key)
    needed = [name for name, field in fields.items() if field.examples or len(fields) == 1]
    if not isinstance(value, str) or len(needed) != 1:
        return ""
    return f" Write {header(key)} on a line of its own, and {needed[0]} = {shown(value)} on the next."


def _wanted(error: ErrorDetails, choices: Sequence[str]) -> str:
    if error["type"] == "literal_error":
        return _listed(choices, "or")
    limit = next((name for name in LIMITS if name in error.get("ctx", {})), None)
    if limit:
        return f"{LIMITS[limit]} {error['ctx'][limit]:,}".removesuffix(".0")
    return TYPES.get(error["type"], error["msg"])


def _choices(key: Key) -> list[str]:
    """The words a setting may be; none for a setting that is not one of a few words."""
    field = field_of(key)
    kinds = [field.annotation, *get_args(field.annotation)] if field else []
    return [word for kind in kinds for word in get_args(kind) if isinstance(word, str)]


def _nearest(value: Any, choices: Sequence[str]) -> str:
    near = get_close_matches(value.lower(), choices, n=1) if isinstance(value, str) else []
    return f" Did you mean {near[0]}?" if near else ""


def _same_value(value: Any, error_type: str) -> str:
    """The value in the type that is wanted, where it has one."""
    written = str(value).lower() if isinstance(value, str | bool | float) else shown(value)
    if error_type in ("int_type", "float_type") and isinstance(value, str | float):
        whole = re.fullmatch(r"[+-]?\d{1,15}(\.0+)?", written)
        number = whole or (error_type == "float_type" and re.fullmatch(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?", written))
        return f" Write {written.split('.')[0] if whole else written}." if number else ""
    if error_type == "bool_type" and written in YES + NO:
        return f" Write {'true' if written in YES else 'false'}."
    if error_type == "string_type" and isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        if not all(name.endswith(".jsonl") for name in value):  # tables have heads, texts have ends
            return " It takes one; make one file of them first."
        return f" It takes one; join several first, such as with cat {shlex.join(value[:2])} > all.jsonl."
    if error_type == "string_type" and not isinstance(value, dict | list):
        return f' Put it in quotes: "{written}".'
    if error_type == "string_pattern_mismatch":
        name = re.sub(r"[^a-z0-9_-]+", "-", value.lower()).strip("-_")[:64]
        return f" Did you mean {name}?" if name else ""
    return ""


def _listed(words: Sequence[str], last: str) -> str:
    return " ".join([", ".join(words[:-1]), last, words[-1]]) if len(words) > 1 else "".join(words)
