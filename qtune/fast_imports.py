"""The libraries that train, imported in less time than they take by themselves."""

import functools
import gc
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quick_imports() -> Iterator[None]:
    """Inside, libraries are imported without what only delays it: the garbage collector, which goes over all that has
    been made so far again and again, and torch's compiler, which bitsandbytes asks for kernel by kernel.

    A function that is to be compiled is compiled when it is first called.
    """
    gc.disable()
    import torch

    compile_now = torch.compile
    torch.compile = compiled_when_called(compile_now)
    try:
        yield
    finally:
        torch.compile = compile_now
        gc.freeze()  # nothing of what was imported is ever garbage
        gc.enable()


def compiled_when_called(compile_now: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` for plain functions, put off; for all else as it is."""

    def put_off(model: Any = None, **settings: Any) -> Any:
        if model is None:
            return functools.partial(put_off, **settings)
        if not inspect.isfunction(model):
            return compile_now(model, **settings)
        compiled = functools.cache(lambda: compile_now(model, **settings))
        return functools.wraps(model)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    return put_off
