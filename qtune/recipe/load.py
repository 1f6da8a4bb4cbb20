"""TOML -> Recipe: every fault at once, each with its line and the nearest valid name. Never imports torch."""

import copy
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qtune.errors import RecipeError
from qtune.recipe.lines import Key, key_lines
from qtune.recipe.schema import Recipe

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
PATHS = {  # settings that may name something on this machine, and whether that is a file
    ("model", "base"): False,
    ("model", "chat_template"): True,
    ("data", "train"): True,
    ("data", "held_out"): True,
}
WANTED_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text in quotes",
    "bool_type": "true or false",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "tuple_type": "a list",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "short and made of a-z, 0-9, - and _, starting with a letter or digit",
}
LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


@dataclass
class Raw:
    """A recipe as nested dictionaries, with where each value was written."""

    file: str
    values: dict[str, Any]
    lines: dict[Key, int] = field(default_factory=dict)
    overrides: dict[Key, str] = field(default_factory=dict)
    replaced_by: dict[Key, Key] = field(default_factory=dict)

    def place(self, name: Key) -> str:
        """`my.toml:14`, or `--set train.epochs=x`, of a key or the nearest table around it."""
        if name in self.overrides:
            return f"--set {self.overrides[name]}"
        name = self.replaced_by.get(name, name)
        for length in range(len(name), 0, -1):
            if name[:length] in self.lines:
                return f"{self.file}:{self.lines[name[:length]]}"
        return self.file

    def line(self, name: Key) -> int:
        name = self.replaced_by.get(name, name)
        return self.lines.get(name, self.lines.get(name[:-1], 0))

    def put(self, name: Key, value: Any) -> None:
        """Set one value, making the tables around it."""
        table = self.values
        for part in name[:-1]:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                return
        table[name[-1]] = value


def load(path: Path, overrides: Sequence[str] = (), demo: bool = False) -> Recipe:
    """The recipe at `path`, with `--set` texts such as `train.epochs=2` applied, and `[demo]` put in place on request.

    What --set says beats [demo], which beats the rest of the file. File names come back absolute: relative to the
    recipe, or to the current folder where --set gave them. Raises RecipeError with every fault found.
    """
    raw = _read(path)
    faults: list[str] = []
    if demo and "demo" not in raw.values:
        faults.append(
            f"{path}: has no [demo] table, so there is nothing for --demo to use. `qtune recipes show medical` has one."
        )
    if demo and isinstance(raw.values.get("demo"), dict):
        _put_demo_in_place(raw)
    faults += _apply_overrides(raw, overrides)
    missing = _make_paths_absolute(raw, path.resolve().parent)
    try:
        recipe = Recipe.model_validate(raw.values)
    except ValidationError as found:
        raise RecipeError(faults + _explain_all(raw, found.errors(), missing)) from None
    faults += [*_in_file_order(raw, missing), *_contradictions(recipe, raw)]
    if faults:
        raise RecipeError(faults)
    return recipe


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe; editors complete and check TOML with it."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "qtune recipe"}


def _read(path: Path) -> Raw:
    if path.is_dir():
        raise RecipeError([f"{path}: is a folder. Name the .toml file in it."])
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise RecipeError([f"{path}: there is no such recipe."]) from None
    except OSError as fault:
        raise RecipeError([f"{path}: cannot be read ({fault.strerror})."]) from None
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as fault:
        line = content.count(b"\n", 0, fault.start) + 1
        message = f"{path}:{line}: byte 0x{content[fault.start]:02x} is not UTF-8. A recipe is a TOML text file."
        raise RecipeError([message]) from None
    if not text.strip():
        raise RecipeError([f"{path}: is empty. `qtune recipes copy medical {path.name}` writes one to start from."])
    try:
        return Raw(str(path), tomllib.loads(text), key_lines(text))
    except tomllib.TOMLDecodeError as fault:
        raise RecipeError([_syntax_fault(path, text, str(fault))]) from None
    except RecursionError:
        raise RecipeError([f"{path}: is nested too deeply to be a recipe."]) from None


def _syntax_fault(path: Path, text: str, message: str) -> str:
    """tomllib's message with the line first, and the line itself behind it."""
    match = re.search(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", message, re.DOTALL)
    if match is None:
        return f"{path}: is not TOML: {message}."
    number = int(match[2]) if match[2] else text.count("\n") + 1
    lines = text.split("\n")
    shown = lines[number - 1].strip() if number <= len(lines) else ""
    where = f", column {match[3]}" if match[3] else ""
    what = match[1][0].lower() + match[1][1:]
    return f"{path}:{number}: is not TOML: {what}{where}" + (f", in `{shown[:60]}`." if shown else ".")


def _put_demo_in_place(raw: Raw) -> None:
    """Copy every value of [demo.TABLE] over [TABLE]; what else the demo's data says comes with its defaults."""
    for table, values in {"model": {"base": "demo"}, **raw.values["demo"]}.items():
        if not isinstance(values, dict):
            continue
        if table == "data":
            values = {"held_out": None, "format": "auto", "columns": {}, **values}
        for key, value in values.items():
            raw.put((table, key), copy.deepcopy(value))
            raw.replaced_by[table, key] = ("demo", table, key)


def _apply_overrides(raw: Raw, overrides: Iterable[str]) -> list[str]:
    """Put every `key=value` in place; a text that is none is a fault."""
    faults = []
    for text in overrides:
        name, equals, value = text.partition("=")
        key = tuple(part.strip() for part in name.split("."))
        if not equals or not all(key):
            faults.append(f"--set {text}: write it as KEY=VALUE, such as train.learning_rate=1e-4.")
            continue
        raw.put(key, _override_value(value.strip()))
        raw.overrides[key] = text
    return faults


def _override_value(text: str) -> Any:
    """The value as TOML reads it, else the text itself: quotes are optional on a command line."""
    try:
        values = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    return values["value"] if len(values) == 1 else text


def _explain_all(raw: Raw, errors: Sequence[ErrorDetails], missing: dict[Key, str]) -> list[str]:
    """One sentence a fault, in the order of the file; what a union says of one value is said once."""
    by_name: dict[Key, str] = {}
    for error in errors:
        name = _field_name(error["loc"])
        by_name.setdefault(name, _explain(name, error))
    return _in_file_order(raw, {**missing, **by_name})


def _in_file_order(raw: Raw, by_name: dict[Key, str]) -> list[str]:
    return [f"{raw.place(name)}: {by_name[name]}" for name in sorted(by_name, key=raw.line)]


def _field_name(loc: tuple[int | str, ...]) -> Key:
    """The key a fault is about: pydantic's location without the branches of a union."""
    model: type[BaseModel] | None = Recipe
    name: list[str] = []
    for part in loc:
        if model is None:
            break
        name.append(str(part))
        model = _table_of(model, str(part))
    return tuple(name)


def _table_of(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The model of a sub-table; None for a plain setting or an unknown key."""
    if key not in model.model_fields:
        return None
    kinds = (model.model_fields[key].annotation, *getattr(model.model_fields[key].annotation, "__args__", ()))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _model_at(name: Key) -> type[BaseModel]:
    model: type[BaseModel] = Recipe
    for part in name:
        model = _table_of(model, part) or model
    return model


def _explain(name: Key, error: ErrorDetails) -> str:
    dotted = ".".join(name)
    if error["type"] == "extra_forbidden":
        return _unknown(name)
    if error["type"] == "missing":
        description = _model_at(name[:-1]).model_fields[name[-1]].description or ""
        return f"{dotted} is missing. It says: {description[0].lower()}{description[1:]}"
    return f"{dotted} must be {_wanted(name, error)}, and is {_shown(error['input'])}.{_nearest_value(error)}"


def _unknown(name: Key) -> str:
    """Not a setting: the nearest one of its table, or the table that has one of this name."""
    *table, key = name
    near = get_close_matches(key, _model_at(tuple(table)).model_fields, n=1, cutoff=0.6)
    if near:
        return f"{'.'.join(name)} is not a setting. Did you mean {near[0]}?"
    homes = [
        other
        for other, info in Recipe.model_fields.items()
        if key in getattr(_table_of(Recipe, other), "model_fields", {})
    ]
    if homes:
        return f"{'.'.join(name)} is not a setting. {key} belongs in [{homes[0]}]."
    return f"{'.'.join(name)} is not a setting. {_known(tuple(table))}"


def _known(table: Key) -> str:
    where = f"[{'.'.join(table)}]" if table else "A recipe"
    return f"{where} has {', '.join(_model_at(table).model_fields)}."


def _wanted(name: Key, error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    if name[-1] == "targets":
        return '"all-linear" or a list of layer names'
    if error["type"] == "literal_error":
        return context["expected"].replace("'", "")
    for limit, words in LIMITS.items():
        if limit in context:
            return f"{words} {context[limit]:g}"
    return WANTED_TYPES.get(error["type"], error["msg"])


def _shown(value: Any) -> str:
    """A value as TOML would write it, cut short."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, bool):
        return str(value).lower()
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _nearest_value(error: ErrorDetails) -> str:
    if error["type"] != "literal_error" or not isinstance(error["input"], str):
        return ""
    valid = re.findall(r"'([^']*)'", error["ctx"]["expected"])
    near = get_close_matches(error["input"], valid, n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _make_paths_absolute(raw: Raw, folder: Path) -> dict[Key, str]:
    """Write the files and folders the recipe names as absolute paths; what is wrong with those that are not there."""
    missing: dict[Key, str] = {}
    for name, is_file in PATHS.items():
        table = raw.values.get(name[0])
        value = table.get(name[1]) if isinstance(table, dict) else None
        start = Path.cwd() if name in raw.overrides else folder
        if not isinstance(value, str) or value == "demo" or not _is_path(value, start, name):
            continue
        found = (start / Path(value).expanduser()).resolve()
        raw.put(name, str(found))
        if fault := _missing(found, is_file):
            missing[name] = f"{'.'.join(name)}: {fault}"
    return missing


def _is_path(value: str, folder: Path, name: Key) -> bool:
    """Whether a name is meant as a path: it looks like one, or something of that name lies beside the recipe."""
    looks = value.startswith(("./", "../", "/", "~")) or value in (".", "..") or name == ("model", "chat_template")
    return looks or (name[0] == "data" and value.lower().endswith(DATA_SUFFIXES)) or (folder / value).exists()


def _missing(path: Path, is_file: bool) -> str | None:
    """What is wrong with a path, or None where it is there and of the right kind."""
    kind = "file" if is_file else "folder"
    if path.is_file() if is_file else path.is_dir():
        return None
    if path.exists():
        return f"{path} is a {'folder' if is_file else 'file'}, and a {kind} is wanted."
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, beside, n=1)
    return f"there is no {kind} {path.name} in {path.parent}." + (f" Did you mean {near[0]}?" if near else "")


def _contradictions(recipe: Recipe, raw: Raw) -> list[str]:
    """Settings that cannot have an effect, where the recipe sets them in so many words."""
    faults = []

    def says(table: str, key: str) -> bool:
        return key in raw.values.get(table, {}) and ("demo", table, key) not in raw.replaced_by.values()

    if recipe.model.quantization == "none" and says("model", "double_quantization"):
        place = raw.place(("model", "double_quantization"))
        faults.append(
            f'{place}: model.double_quantization has no effect with model.quantization = "none". Leave it out.'
        )
    if recipe.data.held_out is not None and says("data", "held_out") and says("data", "held_out_fraction"):
        place = raw.place(("data", "held_out_fraction"))
        faults.append(f"{place}: data.held_out_fraction has no effect beside data.held_out. Leave one of them out.")
    return faults
