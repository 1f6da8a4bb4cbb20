"""TOML -> Recipe: every fault at once, each with its line and the nearest valid name. Never imports torch."""

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from qtune.errors import RecipeError
from qtune.recipe import base_kind, conflicts, paths, toml_reader
from qtune.recipe.error_messages import BARE, Fault, dotted, explain, field_of, header, unknown
from qtune.recipe.schema import Demo, Recipe
from qtune.recipe.toml_reader import Broken, Key, placed

Values = dict[str, Any]
SETTING = re.compile(r"(?:\S+: )?([a-z_]+(?:\.(?:[a-z_]+|\d+))+)\b")


@dataclass(frozen=True)
class Override:
    """One `--set KEY=VALUE`: the text as typed, the setting and its value."""

    text: str
    key: Key
    value: Any


@dataclass(frozen=True)
class Origin:
    """Where each setting was written."""

    file: str
    lines: Mapping[Key, int]
    overrides: Sequence[Override]

    def override(self, key: Key) -> int | None:
        """The number of the last --set that gave `key`, or a table around it."""
        given = [number for number, override in enumerate(self.overrides) if key[: len(override.key)] == override.key]
        return given[-1] if given else None

    def line(self, key: Key) -> int:
        """The line of `key`, or of the nearest table around it; 0 where the file has neither."""
        around = (self.lines[key[:length]] for length in range(len(key), 0, -1) if key[:length] in self.lines)
        return next(around, 0)

    def sentences(self, faults: Sequence[Fault], broken: Sequence[Broken] = ()) -> list[str]:
        """Each fault behind its place: those of the file by line, then those of the command line."""
        told = [(0, each.line, placed(self.file, each.line, each.sentence)) for each in broken]
        for key, sentence in faults:
            number, line = self.override(key), self.line(key)
            if number is not None:
                told.append((1, number, f"--set {self.overrides[number].text}: {sentence}"))
            else:
                told.append((0, line, placed(self.file, line, sentence)))
        return [text for _, _, text in sorted(told, key=lambda place: place[:2])]


def load(
    path: Path,
    overrides: Sequence[str] = (),
    demo: bool = False,
    beside: Path | None = None,
    needs_weights: bool = True,
) -> Recipe:
    """The recipe at `path`, changed by `overrides` (texts such as `train.epochs=2`) and by its [demo] if that is asked.

    An override beats [demo], which beats the rest of the file. Names of files come back absolute: they are relative to
    the recipe, or to the folder `beside` which it came from, in an override to the current folder. Without
    `needs_weights` a folder that holds the base's config.json alone will do. Raises RecipeError with every fault that
    is found.
    """
    document = toml_reader.read(path)
    given, wrong = _parse_overrides(overrides)
    origin = Origin(str(path), document.lines, given)
    values = _put_all(paths.made_absolute(document.values, beside or path.resolve().parent), given)
    recipe, faults = _validate(values, [each.key for each in document.broken])
    faults += _faults_of_paths(values, origin, demo, needs_weights)
    if not document.broken:  # else what a setting is held against may stand in a line that was not read
        faults += _faults_together(values, origin, demo)
    if faults or wrong or document.broken or recipe is None:
        raise RecipeError([*origin.sentences(faults, document.broken), *wrong])
    if demo and recipe.demo is not None:
        recipe, faults = _validate(_put_all(_with_demo(values, recipe.demo), given))
        assert recipe is not None, f"a valid [demo] in a valid recipe: {faults}"
    return recipe


def make_recipe(**settings: Any) -> Recipe:
    """A recipe from Python values, a dict for each table: `make_recipe(name="my", model={"base": "demo"}, data={...})`.

    Names of files are relative to the current folder. Raises RecipeError with every fault that is found.
    """
    origin = Origin("recipe", {}, ())
    values = paths.made_absolute(settings, Path.cwd())
    recipe, faults = _validate(values)
    faults += [*_faults_of_paths(values, origin, False, True), *_faults_together(values, origin, False)]
    if faults or recipe is None:
        raise RecipeError(origin.sentences(faults))
    return recipe


def bare(recipe: Recipe) -> Recipe:
    """The same run without the [demo] that may have made it, and without what has no effect in it."""
    values = _written(recipe)
    values.pop("demo", None)
    for idle in conflicts.idle(values):
        del conflicts.value_of(values, idle.key[:-1])[idle.key[-1]]
    return Recipe(**values)


def as_toml(recipe: Recipe) -> str:
    """A recipe as the text of a file that says the same."""
    return "\n".join(_toml_lines(_written(recipe), ()))


def _written(recipe: Recipe) -> Values:
    """What of a recipe is not left to the defaults."""
    return recipe.model_dump(mode="json", exclude_unset=True, exclude_none=True)


def _toml_lines(table: Values, name: Key) -> Iterator[str]:
    """A TOML value is written as JSON writes it, as long as it is none of JSON's objects and no null."""
    if name:
        yield header(name)
    inner: dict[Key, Values] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            inner[key,] = value
        elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
            inner |= {(key, str(number)): each for number, each in enumerate(value)}
        else:
            quoted = key if BARE.fullmatch(key) else json.dumps(key, ensure_ascii=False)
            yield f"{quoted} = {json.dumps(value, ensure_ascii=False)}"
    yield ""
    for within, value in inner.items():
        yield from _toml_lines(value, (*name, *within))


def blamed(message: str, path: Path, overrides: Sequence[str], demo: bool) -> str:
    """`message` with the place of each setting of the recipe at `path` that a line of it begins with, or names behind a
    file of rows: `my.toml:9: lora.targets: ...`. What `load` could not know yet is then told as its own faults are."""
    try:
        lines = toml_reader.read(path).lines
    except RecipeError:
        return message
    origin = Origin(str(path), lines, _parse_overrides(overrides)[0])
    return "\n".join(_blamed(line, origin, demo) for line in message.split("\n"))


def _blamed(line: str, origin: Origin, demo: bool) -> str:
    named = SETTING.match(line)
    key = tuple(named[1].split(".")) if named else ()
    if not key or field_of(key) is None:
        return line
    replaced = ("demo", *key)
    if demo and origin.override(key) is None and field_of(replaced) is not None:
        key = replaced
    return origin.sentences([(key, line)])[0]


def given_anywhere(overrides: Sequence[str]) -> list[str]:
    """The same overrides with the files they name made absolute, so that they hold in another current folder."""
    given, _ = _parse_overrides(overrides)
    return [
        f"{'.'.join(each.key)}={json.dumps(each.value)}" if isinstance(each.value, str) else each.text for each in given
    ]


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe; editors complete and check TOML with it."""
    schema = Recipe.model_json_schema(schema_generator=_TomlSchema)
    return {"$schema": _TomlSchema.schema_dialect, **schema, "title": "qtune recipe"}


class _TomlSchema(GenerateJsonSchema):
    """Without null, which TOML does not have: what is unset is left out."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def encode_default(self, dft: Any) -> Any:
        encoded = super().encode_default(dft)
        if isinstance(encoded, dict):
            return {name: value for name, value in encoded.items() if value is not None}
        return encoded

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        made = super().default_schema(schema)
        return {name: value for name, value in made.items() if name != "default" or value is not None}


def _validate(values: Values, unread: Sequence[Key] = ()) -> tuple[Recipe | None, list[Fault]]:
    lacking = [conflicts.NO_ROWS] if conflicts.names_no_rows(values) else []
    try:
        return Recipe.model_validate(values), explain(lacking, unread)
    except ValidationError as found:
        return None, explain([*found.errors(include_url=False), *lacking], unread)


def _parse_overrides(texts: Sequence[str]) -> tuple[list[Override], list[str]]:
    """The overrides that name a setting, and a sentence on each text that does not."""
    given, wrong = [], []
    for text in texts:
        name, equals, value = text.partition("=")
        key = tuple(part.strip() for part in name.split("."))
        strange = next((key[:n] for n in range(1, len(key) + 1) if field_of(key[:n]) is None), None)
        if not equals or not all(key):
            wrong.append(f"--set {text}: must be KEY=VALUE, such as train.learning_rate=1e-4.")
        elif strange:
            wrong.append(f"--set {text}: {unknown(strange)[0]}")
        else:
            given.append(Override(text, key, _override_value(key, value.strip())))
    return given, wrong


def _override_value(key: Key, text: str) -> Any:
    """The value as TOML reads it, else the text itself, as quotes are a nuisance on a command line."""
    try:
        values = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        values = {}
    value = values["value"] if len(values) == 1 else text
    return conflicts.value_of(paths.made_absolute(_put({}, key, value), Path.cwd()), key)


def _put_all(values: Values, overrides: Sequence[Override]) -> Values:
    """A copy of `values` with each override in place, its tables made where there are none."""
    for override in overrides:
        values = _put(values, override.key, override.value)
    return values


def _put(values: Any, key: Key, value: Any) -> Any:
    if not key:
        return value
    if isinstance(values, list) and key[0].isdecimal():  # the next one where there are not as many
        at = int(key[0])
        return [*values[:at], _put(dict(enumerate(values)).get(at), key[1:], value), *values[at + 1 :]]
    table = values if isinstance(values, dict) else {}
    return {**table, key[0]: _put(table.get(key[0]), key[1:], value)}


def _with_demo(values: Values, demo: Demo) -> Values:
    """`values` with what --demo replaces: all that [demo.data] has, and of the other tables what is set. An adapter
    of the recipe's base is none of the demo's."""
    replaced = {**demo.model_dump(exclude_none=True), "lora": {"start_from": None}}
    replaced["data"] = {"held_out": None, "sources": (), **replaced["data"]}
    return {**values, **{table: {**values.get(table, {}), **fields} for table, fields in replaced.items()}}


def _faults_of_paths(values: Values, origin: Origin, demo: bool, needs_weights: bool) -> Iterator[Fault]:
    """Of the names that this run will use: with --demo, those of [demo] unless an override says otherwise."""
    runs_code = conflicts.value_of(values, conflicts.TRUST_REMOTE_CODE) is True
    of_rows = () if demo else [(*source, "train") for source in conflicts.keys_of_sources(values)]
    for key in (paths.MODELS[0], paths.START, paths.TEMPLATES[0], *paths.DATA[:2], *of_rows):
        stays = key == paths.TEMPLATES[0] and conflicts.value_of(values, paths.TEMPLATES[1]) is None
        replaced = demo and not stays and origin.override(key) is None
        source = ("demo", *key) if replaced else key
        value = conflicts.value_of(values, source)
        if key == paths.MODELS[0] and isinstance(value, str) and os.path.isabs(value) and os.path.exists(value):
            found = base_kind.fault_of(Path(value), needs_weights, runs_code)
            fault = (source, f"{dotted(source)}: {found}") if found else None
        else:
            fault = paths.fault_of(source, value)
        if fault:
            yield fault


def _faults_together(values: Values, origin: Origin, demo: bool) -> Iterator[Fault]:
    """What is wrong with settings beside one another."""
    yield from _idle(values, origin)
    yield from conflicts.same_rows(values)
    yield from conflicts.of_sources(values)
    yield from conflicts.exclude_each_other(values)
    yield from conflicts.starts_otherwise(values)
    yield from conflicts.unlike_rows(values)
    yield from conflicts.with_optimizer(values)
    yield from conflicts.unpinned_code(values)
    if demo and "demo" not in values:
        yield (), "has no [demo] table for --demo to use. `qtune recipes show medical` shows one."


def _idle(values: Values, origin: Origin) -> Iterator[Fault]:
    """Settings without effect, but for those of the file that an override made so: they cannot be left out there."""
    for found in conflicts.idle(values):
        if origin.override(found.because_of) is None or origin.override(found.key) is not None:
            yield found.fault
