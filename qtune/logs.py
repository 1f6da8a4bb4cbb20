"""What the libraries say goes to one file in the run folder; the terminal is for what qtune says."""

import logging
import logging.handlers
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIBRARIES = ("transformers", "datasets", "accelerate", "trl", "peft", "huggingface_hub", "bitsandbytes")
WARNINGS = "py.warnings"  # the logger that logging.captureWarnings writes to

_held = logging.handlers.MemoryHandler(capacity=100_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
_taken: list[logging.Logger] = []  # whose records are ours: the root of a process of our own, or a host's libraries
_FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


def hold() -> None:
    """In a process of our own, keep every log record and warning in memory until there is a file. Call before a library
    is imported."""
    root = logging.getLogger()
    root.handlers, _taken[:] = [_held], [root]
    root.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a log that cannot be written, on a full disk, is no reason for a traceback
    logging.captureWarnings(True)


@contextmanager
def as_guest() -> Iterator[None]:
    """In somebody else's process, the same for what the libraries say, and for as long as the block lasts; then all is
    as it was. Enter it when they are imported, which is when they set up their logging."""
    if _taken:  # a process of our own, or in such a block already
        yield
        return
    loggers = [logging.getLogger(name) for name in (*LIBRARIES, WARNINGS)]
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in loggers]
    captures = warnings.showwarning.__module__ == logging.__name__
    draws = _draws_bars()
    _taken[:] = loggers
    for logger in loggers:
        logger.handlers, logger.propagate, logger.level = [_held], False, logger.level or logging.INFO
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(captures)
        for handler in {handler for logger in loggers for handler in logger.handlers} - {_held}:
            handler.close()
        for logger, handlers, propagates, level in before:
            logger.handlers, logger.propagate, logger.level = handlers, propagates, level
        _taken.clear()
        _held.setTarget(None)
        _held.buffer.clear()
        if draws:
            sys.modules["transformers"].utils.logging.enable_progress_bar()


def _draws_bars() -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and bool(transformers.utils.logging.is_progress_bar_enabled())


def quiet_libraries() -> None:
    """Send what the libraries print by themselves to the log. Call after they are imported: that is when they begin."""
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        is_taken = logger in _taken
        if not is_taken:
            logger.handlers.clear()
        logger.propagate = not is_taken


def write_to(path: Path) -> None:
    """Write what was held, and all that follows, to `path`."""
    if not _taken:
        return
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(_FORMAT)
    _held.setTarget(file)
    _held.flush()
    for logger in _taken:
        logger.handlers = [file]
