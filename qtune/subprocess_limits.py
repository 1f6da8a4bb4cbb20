"""What a program by strangers gets to run with: a chat template, or code that a model wrote.

Such a program runs in a Python of its own. `python` and `environment` are how that is started, and `limit` is the first
thing it does to itself. It imports this module, so this one imports little.
"""

import os
import resource
import sys

KEPT_VARIABLES = ("TZ", "LD_LIBRARY_PATH")  # the date a program may write; where some builds find their own library
OUR_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # where `import qtune` finds this package
READY, PARSES = b"r", b"p"  # what such a program says of itself and of code it is given, before the answer


def python(program: str, *arguments: str) -> list[str]:
    """The command for `program`, which finds nothing but the standard library until it adds a folder."""
    return [sys.executable, "-I", "-S", program, *arguments]


def environment() -> dict[str, str]:
    """Nothing of ours, so no secrets, but for what Python and the clock need."""
    return {"LC_ALL": "C.UTF-8", **{name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}}


def limit(memory_bytes: int, cpu_seconds: int | None = None, processes: int | None = None) -> None:
    """No more memory than this, no core dumps, and no file that could be written to; a pipe has no size.

    Over `cpu_seconds` the kernel ends the process by SIGKILL. `processes` counts threads too, all of the user's
    outside a user namespace, and does not hold for root.
    """
    most = {resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    if cpu_seconds is not None:
        most[resource.RLIMIT_CPU] = cpu_seconds
    if processes is not None:
        most[resource.RLIMIT_NPROC] = processes
    for limited, value in most.items():
        resource.setrlimit(limited, (value, value))
