"""The program that runs code a model wrote, then its tests, in a process of its own that `sandbox` starts and ends.

On its standard input are three messages, each eight bytes of length and then text: the code, the tests, and a nonce. On
its standard output come READY, then PARSES where the code compiles, then the nonce where the tests ran to their end.
Each message is read when its turn comes, so that code which ends the process, or writes where it should not, has no
nonce to write. The code itself has neither of the two: it reads nothing, and what it prints goes nowhere.

The arguments are the folder in which to look for `qtune.subprocess_limits`, all that this imports of qtune; the limits,
which are processor seconds, bytes of memory and processes; and the folders whose modules the code may import.
"""

import builtins
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

if __name__ == "__main__":
    sys.path.append(sys.argv[1])

from qtune.subprocess_limits import PARSES, READY, limit

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
ALSO_READ = ("/usr/share/zoneinfo", "/etc/localtime")
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv", "os.unsetenv", "socket.__new__")
# Families of audit events (PEP 578): processes, sockets, native code, and objects that are not the code's own.
REFUSED = (
    *("os.", "subprocess.", "pty.", "signal.", "socket.", "syslog.", "sqlite3."),
    *("ctypes.", "gc.", "shutil.", "tempfile.", "resource."),
)
NATIVE = ("ctypes", "_ctypes")


def main() -> None:
    """Answer once; whatever the code has left running ends with this process."""
    cpu_seconds, memory_bytes, processes = (int(argument) for argument in sys.argv[2:5])
    sys.path[-1:] = sys.argv[5:]
    requests, verdicts = os.dup(0), os.dup(1)
    for handle in (0, 1):
        os.dup2(os.open("/dev/null", os.O_RDWR), handle)
    limit(memory_bytes, cpu_seconds, processes)
    os.write(verdicts, READY)
    try:
        run(requests, verdicts)
    finally:
        os._exit(0)


def run(requests: int, verdicts: int) -> None:
    """Raises whatever the code or its tests raise, and then has written no nonce."""
    write, untouched = os.write, dict(vars(builtins))
    program = compile(take(requests), "answer", "exec", dont_inherit=True)
    write(verdicts, PARSES)
    module = types.ModuleType("answer")
    sys.modules["answer"] = sys.modules["__main__"] = module
    refuse_processes()
    sys.addaudithook(guard([sys.prefix, sys.base_prefix, os.getcwd(), *sys.path, *ALSO_READ]))
    exec(program, vars(module))
    tests = compile(take(requests), "tests", "exec", dont_inherit=True)
    # The code may have given `all` or `len` another meaning for everyone; its tests mean the real ones.
    vars(module)["__builtins__"] = untouched
    exec(tests, vars(module))
    write(verdicts, take(requests))


def take(handle: int, read: Callable[[int, int], bytes] = os.read) -> bytes:
    """The next message, and not a byte more."""

    def exactly(count: int) -> bytes:
        parts = b""
        while len(parts) < count:
            part = read(handle, count - len(parts))
            if not part:
                raise EOFError
            parts += part
        return parts

    return exactly(int.from_bytes(exactly(8), "big"))


def refuse_processes() -> None:
    """`subprocess` imports, as asyncio wants it to, but has nothing to start a process with: that raises no event."""

    def fork_exec(*_: Any) -> None:
        raise PermissionError("no process may be started here")

    stand_in = types.ModuleType("_posixsubprocess")
    stand_in.fork_exec = fork_exec  # type: ignore[attr-defined]
    sys.modules["_posixsubprocess"] = stand_in


def guard(folders: Sequence[str]) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook (PEP 578) that raises for what is no computation; files are read in `folders` only."""
    real = os.path.realpath
    readable = tuple(real(folder).rstrip("/") for folder in folders)

    def is_readable(path: Any) -> bool:
        found = real(os.fsdecode(path))
        return any(found == folder or found.startswith(f"{folder}/") for folder in readable)

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, int) and path not in DEVICES and (flags & WRITES or not is_readable(path)):
                raise PermissionError(f"{path!r} may not be opened here")
        elif event == "import" and arguments[0] in NATIVE:
            raise ImportError(f"{arguments[0]} may not be imported here")
        elif event.startswith(REFUSED) and event not in HARMLESS:
            raise PermissionError(f"{event} is not allowed here")

    return refuse


if __name__ == "__main__":
    main()
