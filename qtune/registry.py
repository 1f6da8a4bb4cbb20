"""Things of one kind, a file each in one package: who adds a file there has added one. There is no list to keep."""

import importlib
import pkgutil
from typing import Any, Protocol, TypeVar


class Named(Protocol):
    """What can be registered: `name` is what a recipe or a command line calls it."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


def registered(package: str, kind: type[T]) -> dict[str, T]:
    """Every `kind` that a module of `package` holds at its top level, by name; in the order of `order`, where a kind
    has one, and of the names. Imports every module of the package, so what they need to be imported must be light.

    Raises ValueError where two have one name.
    """
    things: dict[str, T] = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = importlib.import_module(f"{package}.{info.name}")
        for thing in vars(module).values():
            if not isinstance(thing, kind):
                continue
            if things.setdefault(thing.name, thing) is not thing:
                raise ValueError(f"{module.__name__}: {thing.name} is registered by another file of {package}, too")
    return dict(sorted(things.items(), key=_place))


def _place(item: tuple[str, Any]) -> tuple[float, str]:
    name, thing = item
    return getattr(thing, "order", 0), name
