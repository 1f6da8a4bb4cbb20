"""Code that a model wrote, run against tests in a process of its own. Linux only.

What holds, by the kernel: 4 seconds of processor time and 20 of any, 512 MiB of address space, no byte written to any
file, nothing of our environment and no open file of ours, output that goes nowhere, 64 processes (not for root), and
all of them ended with the answer. Where the kernel gives user namespaces to who asks, there is no network either, and
no other process to be seen. As a second line, a hook in the child's Python refuses processes, sockets, native code,
every change to a folder and every file outside Python's own libraries.

What does not: it is no virtual machine. The hook lives in the process that it guards, so code made to break out of it
does, and is then a program of the user's, less what the kernel holds: it can read and delete files. The verdict is safe
from code that ends the process, prints, or gives builtins another meaning. Code made to cheat, by walking through the
frames of what runs it or by answering with an object that equals everything, passes. A model does neither by chance.
"""

import functools
import logging
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qtune.errors import MachineError
from qtune.subprocess_limits import OUR_FOLDER, PARSES, READY, environment, python
from qtune.units import MIB

CPU_SECONDS, MEMORY_BYTES, PROCESSES = 4, 512 * MIB, 64
WALL_SECONDS, START_SECONDS = 20, 60  # for a process that waits its turn on a busy machine
NONCE_BYTES = 16
WORKER = str(Path(__file__).with_name("sandbox_worker.py"))
ALONE = ("--user", "--map-current-user", "--net", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")


@dataclass(frozen=True)
class ProgramRun:
    """What became of one answer."""

    parses: bool
    passes: bool


def refuse_elsewhere() -> None:
    """Raises MachineError on a system where the limits do not hold."""
    if sys.platform != "linux":
        raise MachineError(
            'evaluate.metric = "code_tests" runs code that a model wrote, under limits that only Linux has. Score it'
            ' there, or set evaluate.metric = "token_f1", which runs nothing.'
        )


def run(code: str, tests: str) -> ProgramRun:
    """Whether `code` is Python, and whether `tests`, run after it in what it defines, come to their end.

    Raises MachineError where no child can be started.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    with tempfile.TemporaryDirectory(prefix="qtune-code-") as folder:
        said = _said([*(text.encode(errors="surrogatepass") for text in (code, tests)), nonce], folder)
    if not said.startswith(READY):
        raise MachineError(f"The process that runs answers does not start. It is {sys.executable} with {WORKER}.")
    parses = said[1:2] == PARSES
    return ProgramRun(parses, parses and secrets.compare_digest(said[2:], nonce))


def _said(messages: Sequence[bytes], folder: str) -> bytes:
    """What the child writes on being given the messages; it and all it started are gone when this returns."""
    limits = (str(limit) for limit in (CPU_SECONDS, MEMORY_BYTES, PROCESSES))
    with tempfile.TemporaryFile() as requests:
        requests.writelines(len(message).to_bytes(8, "big") + message for message in messages)
        requests.seek(0)
        process = subprocess.Popen(
            [*_alone(), *python(WORKER, OUR_FOLDER, *limits, *_libraries())],
            stdin=requests,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
            cwd=folder,
            process_group=0,  # Ctrl-C is for us
        )
    with process:
        assert process.stdout is not None
        handle = process.stdout.fileno()
        try:
            said = _read(handle, 1, START_SECONDS)
            return said + _read(handle, 1 + NONCE_BYTES, WALL_SECONDS) if said else said
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def _read(handle: int, count: int, seconds: float) -> bytes:
    """What comes within so many seconds, at most `count` bytes, so that no flood of it comes in."""
    said, until = b"", time.monotonic() + seconds
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    while len(said) < count and poll.poll(max(0.0, until - time.monotonic()) * 1000):
        part = os.read(handle, count - len(said))
        if not part:
            break
        said += part
    return said


def _libraries() -> list[str]:
    """Where what is installed beside qtune is found; the code may import of it what needs no ctypes."""
    return sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")})


@functools.cache
def _alone() -> tuple[str, ...]:
    """The command in front that cuts a process off from network and other processes; empty where it may not."""
    program = shutil.which("unshare")
    for flags in (ALONE, ALONE[:-1]) if program else ():
        command = (program, *flags, "--")
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return command
    logging.getLogger(__name__).warning(
        "Answers run without namespaces, which this system does not give: only the hook in their Python keeps them from"
        " the network."
    )
    return ()
