"""`qtune completion`: what the shell offers behind a half-typed command: run folders, recipes, settings, their values.

The shell starts qtune itself, which knows its verbs and options (argcomplete); bash, zsh and fish are served alike.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin

from qtune.commands.verb import Verb

SHELLS = ("bash", "zsh", "fish", "tcsh")
Offered = dict[str, str] | list[str]  # with a description each, which zsh and fish show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="source what this prints")


def act(options: argparse.Namespace) -> None:
    import argcomplete

    print(argcomplete.shellcode(["qtune"], shell=options.shell))


def answer(parser: argparse.ArgumentParser) -> None:
    """Tell the shell what fits, and end this process."""
    import argcomplete

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
    from argcomplete.completers import DirectoriesCompleter

    from qtune.rundir import RUNS, runs_in

    runs = [str(run.path) for run in runs_in(RUNS)]
    return [run for run in runs if run.startswith(prefix)] or _names(DirectoriesCompleter(), prefix)


def _runs_and_files(prefix: str, **_: Any) -> Offered:
    return [*dict.fromkeys([*_runs(prefix), *_files("gguf", prefix)])]


def _recipes(prefix: str, **_: Any) -> Offered:
    return _shipped() | dict.fromkeys(_files("toml", prefix), "")


def _shipped(**_: Any) -> dict[str, str]:
    from qtune.recipe import shipped_recipes

    return {row["name"]: row["about"] for row in shipped_recipes.rows()}


def _settings(prefix: str, **_: Any) -> Offered:
    """`train.epochs=`, and behind the sign the values that are known."""
    from qtune.recipe.error_messages import settings

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
    from qtune.evaluate.metrics import METRICS

    return list(METRICS)


def _files(suffix: str, prefix: str) -> list[str]:
    from argcomplete.completers import FilesCompleter

    return _names(FilesCompleter([suffix]), prefix)


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

VERB = Verb(
    name="completion",
    help="shell completion script",
    arguments=add_arguments,
    act=act,
    answers_json=False,
    order=170,
)
