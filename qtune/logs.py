"""What the libraries say goes to one file in the run folder; the terminal is for what qtune says."""

import logging
import logging.handlers
from pathlib import Path

LIBRARIES = ("transformers", "datasets", "accelerate", "trl", "peft", "huggingface_hub", "bitsandbytes")

_held = logging.handlers.MemoryHandler(capacity=100_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
_FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


def hold() -> None:
    """Keep every log record and warning in memory until there is a file. Call before a library is imported."""
    root = logging.getLogger()
    root.handlers = [_held]
    root.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a log that cannot be written, on a full disk, is no reason for a traceback
    logging.captureWarnings(True)


def quiet_libraries() -> None:
    """Send what the libraries print by themselves to the log. Call after they are imported: that is when they begin."""
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def write_to(path: Path) -> None:
    """Write what was held, and all that follows, to `path`."""
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(_FORMAT)
    _held.setTarget(file)
    _held.flush()
    logging.getLogger().handlers = [file]
