"""What the shell offers behind a half-typed command: run folders, recipes, settings and their values.

The shell starts qtune itself, which knows its verbs and options (argcomplete); bash, zsh and fish are served alike.
Nothing that loads torch is imported here.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin

import argcomplete
from argcomplete.completers import DirectoriesCompleter, FilesCompleter

from qtune.evaluate.metrics import METRICS
from qtune.recipe import shipped_recipes
from qtune.recipe.error_messages import settings
from qtune.rundir import RUNS, runs_in

SHELLS = ("bash", "zsh", "fish", "tcsh")
Offered = dict[str, str] | list[str]  # with a description each, which zsh and fish show


def script(shell: str) -> str:
    """What a shell of SHELLS is to source."""
    code: str = argcomplete.shellcode(["qtune"], shell=shell)
    return code


def answer(parser: argparse.ArgumentParser) -> None:
    """Tell the shell what fits, and end this process."""
    for action in _actions(parser):
        if action.dest in OFFERED_BY_DEST:
            setattr(action, "completer", OFFERED_BY_DEST[action.dest])  # noqa: B010  (where argcomplete looks)
    argcomplete.autocomplete(parser, always_complete_options="long")


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _actions(verb)
        else:
            yield action


def _runs(prefix: str, **_: Any) -> Offered:
    runs = [str(run.path) for run in runs_in(RUNS)]
    return [run for run in runs if run.startswith(prefix)] or _names(DirectoriesCompleter(), prefix)


def _runs_and_files(prefix: str, **_: Any) -> Offered:
    return [*dict.fromkeys([*_runs(prefix), *_names(FilesCompleter(["gguf"]), prefix)])]


def _recipes(prefix: str, **_: Any) -> Offered:
    return _shipped() | dict.fromkeys(_names(FilesCompleter(["toml"]), prefix), "")


def _shipped(**_: Any) -> dict[str, str]:
    return {row["name"]: row["about"] for row in shipped_recipes.rows()}


def _settings(prefix: str, **_: Any) -> Offered:
    """`train.epochs=`, and behind the sign the values that are known."""
    key, equals, _value = prefix.partition("=")
    every = settings()
    if equals:
        return [f"{key}={value}" for value in _values_of(every[key].annotation)] if key in every else []
    return {f"{name}=": field.description or "" for name, field in every.items()}


def _values_of(annotation: Any) -> list[str]:
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [value for part in get_args(annotation) for value in _values_of(part)]


def _metrics(**_: Any) -> Offered:
    return list(METRICS)


def _names(completer: Callable[..., Any], prefix: str) -> list[str]:
    return list(completer(prefix))


OFFERED_BY_DEST: dict[str, Callable[..., Offered]] = {
    "run": _runs_and_files,
    "runs": _runs,
    "compare": _runs,
    "recipe": _recipes,
    "name": _shipped,
    "set": _settings,
    "metric": _metrics,
}
