"""qtune: QLoRA fine-tuning on one consumer GPU.

    import qtune

    recipe = qtune.load_recipe("medical", demo=True)
    run = qtune.finetune(recipe)
    print(run.scores["tuned"]["score"], run.losses)
    run.merge("merged")

docs/python.md tells of all of it. Nothing is imported until it is asked for, and importing qtune changes nothing in
the process that does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qtune import errors, events
    from qtune.errors import (
        DataError,
        DiskFull,
        DoesNotFit,
        MachineError,
        ModelError,
        OutOfMemory,
        QtuneError,
        RecipeError,
        RunFolderError,
        TrainingDiverged,
        UserError,
        VerificationFailed,
    )
    from qtune.library import Run, Training, check_data, finetune, load_recipe, make_plan, open_run, show
    from qtune.recipe.load import make_recipe
    from qtune.recipe.schema import Recipe

__all__ = [
    "DataError",
    "DiskFull",
    "DoesNotFit",
    "MachineError",
    "ModelError",
    "OutOfMemory",
    "QtuneError",
    "Recipe",
    "RecipeError",
    "Run",
    "RunFolderError",
    "Training",
    "TrainingDiverged",
    "UserError",
    "VerificationFailed",
    "check_data",
    "errors",
    "events",
    "finetune",
    "load_recipe",
    "make_plan",
    "make_recipe",
    "open_run",
    "show",
]

_MODULES = {"errors": "qtune.errors", "events": "qtune.events"}
_LIBRARY = ("Run", "Training", "check_data", "finetune", "load_recipe", "make_plan", "open_run", "show")
_HOMES = {  # of what is neither an error nor one of _MODULES
    "Recipe": "qtune.recipe.schema",
    "make_recipe": "qtune.recipe.load",
    **dict.fromkeys(_LIBRARY, "qtune.library"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'qtune' has no attribute {name!r}")
    if name in _MODULES:
        return import_module(_MODULES[name])
    return getattr(import_module(_HOMES.get(name, "qtune.errors")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
