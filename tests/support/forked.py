"""Python in a process of its own, at once: a fork of one that has imported the libraries, and nothing of qtune.

torch, transformers, peft and trl take four seconds to import, and a fork that finds them imported a few hundredths.
What is asked for is what Python is asked for: `-m MODULE`, `-c CODE` or a script, with arguments, environment, current
folder and standard streams. What a start imports, and in how little time, is not seen here: tests of that start Python
itself.
"""

import atexit
import contextlib
import fcntl
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

MOST_ASKED_BYTES = 2**17  # of arguments and environment; a socket takes 200 KiB in one piece
ENVIRONMENT = dict(os.environ)  # before any test changes it
READ_ON_IMPORT = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")


class Forked:
    """`python ARGUMENTS`, running; its standard input, output and error are the file descriptors `streams`.

    Raises ValueError where `env` sets anew what the libraries have read as they were imported.
    """

    returncode: int | None = None

    def __init__(
        self,
        arguments: Sequence[str | Path],
        streams: Sequence[int],
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        takes_terminal: bool = False,
    ):
        env = dict(os.environ if env is None else env)
        if late := [name for name in READ_ON_IMPORT if ENVIRONMENT.get(name) != env.get(name)]:
            raise ValueError(
                f"{', '.join(late)}: read when libraries are imported, which is done. Start Python itself."
            )
        asked = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd or Path.cwd()),
            "env": env,
            "takes_terminal": takes_terminal,
        }
        self._told, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(_server(), [json.dumps(asked).encode()], [theirs.fileno(), *streams])
        self.pid = int(self._told.recv(32))

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; -9 for one that was killed. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("python", timeout or 0)
            self.returncode = int(self._told.recv(32))
            self._told.close()
        return self.returncode


def run(
    arguments: Sequence[str | Path], cwd: str | Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with nothing to read, and all that is printed kept as text."""
    with open(os.devnull) as nothing, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        forked = Forked(arguments, [nothing.fileno(), out.fileno(), err.fileno()], cwd, env)
        try:
            code = forked.wait(timeout=300)
        except BaseException:
            os.kill(forked.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess([*map(str, arguments)], code, _all_of(out), _all_of(err))


def _all_of(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode()


@functools.cache
def _server() -> socket.socket:
    """To the one server of all processes that run these tests, which ends with the last that has asked it."""
    address = (
        f"\0qtune's tests {ENVIRONMENT.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"  # no file: it is gone with it
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening, contextlib.suppress(OSError):
        listening.bind(address)  # which the first alone can
        listening.listen()
        command, closed = [sys.executable, __file__, str(listening.fileno())], subprocess.DEVNULL
        subprocess.Popen(command, pass_fds=[listening.fileno()], stdin=closed, stdout=closed, env=ENVIRONMENT)
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for _ in range(100):
        with contextlib.suppress(ConnectionRefusedError):  # between the first's two calls
            ours.connect(address)
            break
        time.sleep(0.01)
    return ours


def import_libraries() -> None:
    """What a run imports, less qtune itself."""
    from qtune.fast_imports import quick_imports

    with quick_imports():
        import numba  # noqa: F401
        import torch
        import transformers.models.llama.modeling_llama  # noqa: F401

        import qtune.run  # noqa: F401
    for name in [name for name in sys.modules if name.partition(".")[0] == "qtune" or sys.modules[name] is None]:
        for value in vars(sys.modules.pop(name) or types).values():
            if isinstance(
                value, torch.library.Library
            ):  # torch holds on to it, and whoever imports qtune makes another
                value._destroy()


def serve(listening: socket.socket) -> dict[str, Any]:
    """Fork for all who ask. Returns only in the forks, what was asked for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal is for the tests, with which this ends
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers that have ended are gone
    asking: list[socket.socket] = []
    while True:
        ready = select.select([listening, *asking], [], [])[0][0]
        if ready is listening:
            asking.append(listening.accept()[0])
            continue
        asked, descriptors, _, _ = socket.recv_fds(ready, MOST_ASKED_BYTES, 4)
        if not asked:
            asking.remove(ready)
            ready.close()
            if not asking:
                os._exit(0)
            continue
        if os.fork() == 0:
            for each in (listening, *asking):
                each.close()
            _keep(*descriptors)
            return {**json.loads(asked), "streams": descriptors[1:]}
        for descriptor in descriptors:
            os.close(descriptor)


def _keep(telling: int, *streams: int) -> None:
    """Fork once more, and tell the fork's id and how it ended. Returns only in the fork."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(telling)
        return
    for stream in streams:  # or who reads from the fork would wait for this process, too
        os.close(stream)
    os.write(telling, str(pid).encode())
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):  # nobody waits any more
        os.write(telling, str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def become(arguments: list[str], cwd: str, env: dict[str, str], takes_terminal: bool, streams: list[int]) -> None:
    """Make this process what Python would have made of it before its first line."""
    if takes_terminal:
        os.setsid()
        fcntl.ioctl(streams[0], termios.TIOCSCTTY, 0)
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    theirs = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    installed = [path for path in sys.path[1:] if path not in theirs]
    os.environ.clear()
    os.environ.update(env)
    encoding = env.get("PYTHONIOENCODING")
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding=encoding, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding=encoding, closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, encoding, "backslashreplace", closefd=False)
    tempfile.tempdir = None  # found anew, in this environment
    first = {"-m": cwd, "-c": ""}.get(arguments[0], str(Path(arguments[0]).resolve().parent))
    sys.path[:] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *installed]


def run_as_python_does(arguments: list[str]) -> None:
    how, *rest = arguments
    if how == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv = arguments
        runpy.run_path(how, run_name="__main__")


def end_at_once(code: list[int]) -> None:
    """The last thing before modules are taken apart, which of all these libraries takes most of a second."""
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code[0])


def main() -> None:
    code: list[int] = []
    atexit.register(end_at_once, code)  # first here, it is called last
    import_libraries()
    gc.collect()
    gc.freeze()  # collections of a fork need not walk the libraries
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    become(**asked)
    try:
        run_as_python_does(asked["arguments"])
        code.append(0)
    except SystemExit as end:
        code.append(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    except Exception:
        code.append(1)
        raise


if __name__ == "__main__":
    main()
