"""Arguments that several verbs take: how each is written, and what it opens."""

import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qtune.errors import MachineError, RecipeError, UserError, how_to_install
from qtune.guest import OFFLINE, are_here, sources
from qtune.units import parse_bytes

if TYPE_CHECKING:
    from qtune.recipe.schema import Recipe
    from qtune.rundir import RunDir


def recipe_arguments(parser: ArgumentParser, is_optional: bool = False) -> None:
    parser.add_argument(
        "recipe",
        nargs="?" if is_optional else None,
        help="a recipe file, or the name of a shipped one such as medical",
    )
    set_argument(parser)
    parser.add_argument("--demo", action="store_true", help="use what the recipe's [demo] says: small base, small data")


def set_argument(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, such as train.learning_rate=1e-4; may be given again",
    )


def load_recipe(options: Namespace, needs_weights: bool = True) -> tuple["Recipe", Path]:
    """The recipe of the command line, with its faults reported before any heavy import."""
    from qtune import logs
    from qtune.recipe import load, shipped_recipes

    path = shipped_recipes.find(options.recipe)
    recipe = load.load(path, options.set, options.demo, needs_weights=needs_weights)
    logs.hold()
    stay_offline_when_local(recipe)
    return recipe, path


def said_by_line(fault: UserError, options: Namespace) -> str:
    """The message, behind the line of the recipe that it blames, where it blames one."""
    from qtune.recipe import load, shipped_recipes

    if isinstance(fault, RecipeError):
        return str(fault)
    return load.blamed(str(fault), shipped_recipes.find(options.recipe), options.set, options.demo)


def stay_offline_when_local(recipe: "Recipe") -> None:
    """Without a hub name in the recipe no library may ask the network for anything."""
    stay_offline_with(*sources(recipe))


def stay_offline_with(*names: str | None) -> None:
    if are_here(*names):
        os.environ[OFFLINE] = "1"


def run_argument(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder")


def base_argument(parser: ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="where the run's base is now, if it was moved")


def open_run(path: Path, base: Path | None, *more: str | None) -> "RunDir":
    """A run to answer, merge or export with; its libraries ask no network where its base, and what else is needed, is
    on this machine."""
    from qtune import logs
    from qtune.model.fingerprint import refuse_unusable
    from qtune.rundir import RunDir

    run = RunDir.open(path, base)
    refuse_unusable(run)
    logs.hold()
    stay_offline_with(run.read_lock().base_name, *more)
    return run


def open_model(path: Path) -> None:
    """Make ready for a merged folder or a GGUF file, of which no library is to ask the network."""
    from qtune import logs

    logs.hold()
    stay_offline_with(str(path.absolute()))


def refuse_without_llama_cpp(path: Path) -> None:
    """Raises MachineError for a GGUF file where nothing can read it."""
    from qtune.recipe.base_kind import GGUF_SUFFIX

    if path.suffix == GGUF_SUFFIX and find_spec("llama_cpp") is None:
        raise MachineError(f"{path}: needs llama-cpp-python, which is not installed: {how_to_install('verify')}")


def refuse_given_output(options: Namespace) -> None:
    """Raises RunFolderError where a new folder was named and cannot be one."""
    from qtune.rundir import refuse_used

    if options.output is not None:
        refuse_used(options.output)


def size(text: str) -> int:
    """Bytes of a size such as 8GiB."""
    found = parse_bytes(text)
    if found is None:
        hint = f". Did you mean {text.strip()}GiB?" if text.strip().isdigit() else ""
        raise ArgumentTypeError(f"must be a size such as 8GiB, and is {text}{hint}")
    return found


def positive(text: str) -> int:
    return _at_least(1, text)


def natural(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise ArgumentTypeError(f"must be at least {least}, and is {value}")
    return value


def between(least: float, most: float, text: str) -> float:
    value = float(text)
    if not least <= value <= most:
        raise ArgumentTypeError(f"must be {least:g} to {most:g}, and is {text}")
    return value
