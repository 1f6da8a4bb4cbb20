"""A terminal that does not print what is typed, such as the ^C of a Ctrl-C, into a picture."""

import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

LOCAL_FLAGS = 3  # where termios.tcgetattr has c_lflag


@contextmanager
def no_echo(file: IO[str]) -> Iterator[None]:
    """Signals are sent as ever. What is no terminal, or is gone, is left alone."""
    before = None
    with suppress(OSError, ValueError, termios.error):
        before = termios.tcgetattr(file.fileno())
        quiet = [*before[:LOCAL_FLAGS], before[LOCAL_FLAGS] & ~termios.ECHO, *before[LOCAL_FLAGS + 1 :]]
        termios.tcsetattr(file.fileno(), termios.TCSANOW, quiet)
    try:
        yield
    finally:
        if before is not None:
            with suppress(OSError, ValueError, termios.error):
                termios.tcsetattr(file.fileno(), termios.TCSANOW, before)
