"""Traces of fake steps, made once in a process for the same question: a plan takes longer than a run of eight steps.

A trace depends on the shape of a model, the adapter on it, the techniques and the batch, and on nothing else that a
recipe says. It is made anew where a test has put something else into the code that it runs through.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from qtune.plan import activation_memory
from qtune.plan.plan import Plan
from qtune.plan.planner import decide
from qtune.recipe.schema import Recipe

RUN_THROUGH = ("qtune.accelerator", "qtune.memory", "qtune.model", "qtune.plan", "qtune.train.optimizers")
as_first_seen: dict[tuple[str, str], Any] = {}
made: dict[Any, Any] = {}
held: list[Any] = []  # what tests have put in, as an id is given again to what comes after


def install() -> None:
    """Have the planner ask for traces, and for what stands beside them, here."""
    for function in (activation_memory.trace, activation_memory.count):
        setattr(activation_memory, function.__name__, once(function))


def unweighed(*asked: Any, weighs_all: bool = False, **named: Any) -> Plan:
    """`decide`, but not of what each technique that is off would save, which takes a trace each."""
    return decide(*asked, **named)


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def made_before(config: Any, recipe: Recipe, *others: Any, **named: Any) -> Any:
        if named.get("counter") is not None:
            return function(config, recipe, *others, **named)
        shape = json.dumps({**config.to_dict(), "_name_or_path": ""}, sort_keys=True, default=str)
        key = (function.__name__, type(config), shape, _asked(recipe), others, tuple(named.items()), tuple(_put_in()))
        if key not in made:
            made[key] = function(config, recipe, *others, **named)
        return made[key]

    return made_before


def _asked(recipe: Recipe) -> str:
    model = recipe.model.model_dump(exclude={"base", "revision"}, mode="json")
    others = [part.model_dump(mode="json") for part in (recipe.lora, recipe.memory)]
    return json.dumps([model, *others, recipe.train.optimizer])


def _put_in() -> Iterator[tuple[str, str, int]]:
    """What is not what it was when this was first asked, in the modules that a trace runs through."""
    for name, value in _attributes():
        if as_first_seen.setdefault(name, value) is not value:
            held.append(value)
            yield (*name, id(value))


def _attributes() -> Iterator[tuple[tuple[str, str], Any]]:
    for name in sorted(name for name in sys.modules if name.startswith(RUN_THROUGH)):
        for attribute, value in list(vars(sys.modules[name]).items()):
            yield (name, attribute), value
            if isinstance(value, type) and value.__module__ == name:
                yield from (((f"{name}.{attribute}", part), each) for part, each in list(vars(value).items()))
