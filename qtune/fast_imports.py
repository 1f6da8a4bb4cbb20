"""The libraries that train, imported in less time than they take by themselves, and without code from elsewhere."""

import functools
import gc
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

TELEMETRY = "HF_HUB_DISABLE_TELEMETRY"  # read by huggingface_hub when it is imported
KERNELS = "kernels"


def settle_own_process() -> None:
    """For a process of our own, from its first line on: no telemetry, and no native code of others.

    With the package `kernels` installed, bitsandbytes and transformers fetch native code from the hub and run it, the
    first while it is imported. Nobody asked for that, and no setting turns it off: they are not to find the package.
    """
    os.environ.setdefault(TELEMETRY, "1")
    sys.modules.setdefault(KERNELS, None)  # type: ignore[arg-type]


@contextmanager
def quick_imports() -> Iterator[None]:
    """Inside, libraries are imported without what only delays it: the garbage collector, which goes over all that has
    been made so far again and again, and torch's compiler, which bitsandbytes asks for kernel by kernel; and settled as
    in `settle_own_process`. Afterwards the process is as it was.

    A function that is to be compiled is compiled when it is first called.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with settled():
            import torch

            compile_now = torch.compile
            torch.compile = compiled_when_called(compile_now)
            try:
                yield
            finally:
                torch.compile = compile_now
    finally:
        if collects:
            gc.enable()


@contextmanager
def settled() -> Iterator[None]:
    """The same as `settle_own_process` in somebody else's, for as long as the block lasts: some libraries are imported
    only when something of them is used."""
    has_telemetry, knows_kernels = TELEMETRY not in os.environ, KERNELS not in sys.modules
    show_warning = warnings.showwarning
    settle_own_process()
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm, in a notebook without ipywidgets
    ignored, nobody = warnings.filters[0], logging.NullHandler()
    logging.getLogger("bitsandbytes").addHandler(nobody)  # it says on the terminal that it did not find `kernels`
    try:
        yield
    finally:
        logging.getLogger("bitsandbytes").removeHandler(nobody)
        with suppress(ValueError):  # of a block in a block
            warnings.filters.remove(ignored)  # type: ignore[attr-defined]  # a list, by its documentation
        if warnings.showwarning is not show_warning:
            logging.captureWarnings(False)  # detect-secrets has them captured when it is imported
        if has_telemetry:
            del os.environ[TELEMETRY]
        if knows_kernels:
            del sys.modules[KERNELS]


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
