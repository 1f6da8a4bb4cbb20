"""A program at a pseudo-terminal of its own, as a user has it: with Ctrl-C, and as the terminal's foreground job."""

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import termios
from collections.abc import Sequence
from pathlib import Path

from forked import Forked

ROOT = Path(__file__).resolve().parent.parent.parent


class AtTerminal:
    """`command` in `folder`; `type` what a user types, and `read` what is printed.

    One of Python may be forked from a process that has imported the libraries.
    """

    def __init__(self, command: Sequence[str | Path], folder: Path, is_forked: bool = False, **environment: str):
        self._master, slave = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT), **environment}
        self.process: subprocess.Popen | Forked
        if is_forked:
            self.process = Forked(command[1:], (slave, slave, slave), folder, env, takes_terminal=True)
        else:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdin=slave,
                stdout=slave,
                stderr=slave,
                cwd=folder,
                start_new_session=True,
                env=env,
                preexec_fn=_take_terminal,
            )
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read(self) -> bytes:
        """What has been printed since, as soon as there is some; nothing once the program has ended."""
        try:
            return os.read(self._master, 65_536)
        except OSError:  # how Linux says that the last process has closed the terminal
            return b""

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=10)
        os.close(self._master)


def _take_terminal() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
