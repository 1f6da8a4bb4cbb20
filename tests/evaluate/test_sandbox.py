"""Code that a model wrote is run against its tests, and can do nothing else; each hostile answer here was run."""

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from qtune.errors import MachineError
from qtune.evaluate import sandbox
from qtune.evaluate.sandbox import ProgramRun

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")

DOUBLE = "def double(x):\n    return 2 * x\n"
TESTS = "assert double(2) == 4\nassert double('a') == 'aa'"
PASSES, FAILS, NO_PYTHON = ProgramRun(True, True), ProgramRun(True, False), ProgramRun(False, False)


def children_of(process: int) -> set[str]:
    """Every process whose chain of parents leads to `process`; other tests may have left some that wait for work."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[stat.parent.name] = stat.read_text().rpartition(")")[2].split()[1]
        except OSError:  # it ended
            continue
    found, fresh = set(), {str(process)}
    while fresh:
        fresh = {child for child, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return found


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (DOUBLE, PASSES),
        ("def double(x):\n    return x * x\n", FAILS),
        ("def double(x)\n    return 2 * x", NO_PYTHON),
        ("", FAILS),
        ("Here is the function.", NO_PYTHON),
        ("double = 1 / 0", FAILS),
        ("\ud800", NO_PYTHON),
        ("x = '\0'", NO_PYTHON),
        ("(" * 100_000, NO_PYTHON),
        ("print('hello')\n" + DOUBLE + "if __name__ == '__main__':\n    double(input())", PASSES),
        (
            "import asyncio\nasync def half(x):\n    return x\ndef double(x):\n    return 2 * asyncio.run(half(x))",
            PASSES,
        ),
        (
            "from __future__ import annotations\nfrom dataclasses import dataclass\n"
            "@dataclass\nclass Two:\n    x: object\ndef double(x):\n    return Two(x).x * 2",
            PASSES,
        ),
        ("import collections, re, heapq, itertools, datetime, decimal, random\n" + DOUBLE, PASSES),
    ],
)
def test_an_answer_is_python_and_passes_or_not(code: str, verdict: ProgramRun) -> None:
    assert sandbox.run(code, TESTS) == verdict


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "def double(x):\n    raise SystemExit(0)",
        "import os\ndef double(x):\n    os._exit(0)",
        "import os\nfor handle in range(20):\n    try: os.write(handle, b'p' * 50)\n    except OSError: pass",
        "import builtins\nbuiltins.AssertionError = type('Fine', (Exception,), {})\ndef double(x): pass",
        "import builtins\nbuiltins.len = builtins.all = lambda *_: True\ndef double(x): pass",
        "import sys\nsys.modules.clear()\nsys.settrace(lambda *_: None)\ndef double(x): pass",
        "__builtins__ = {}\ndef double(x): pass",
        "import atexit\natexit.register(lambda: None)\ndef double(x): pass",
    ],
)
def test_what_is_no_solution_does_not_pass(code: str) -> None:
    assert sandbox.run(code, "assert all([double(2) == 4, len([double(2)]) == 5])") == FAILS


def refused(code: str) -> bool:
    """Whether the statements in `code` raise, by an answer that would pass if they did not."""
    indented = code.replace("\n", "\n    ")
    done = sandbox.run(f"def tried():\n    {indented}\n    return True", "assert tried()")
    caught = sandbox.run(
        f"def tried():\n    try:\n        {indented.replace(chr(10), chr(10) + '    ')}\n"
        "    except (OSError, ImportError):\n        return True\n    return False",
        "assert tried()",
    )
    return not done.passes and caught.passes


@pytest.mark.parametrize(
    "code",
    [
        "import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)",
        "import socket\nsocket.socket().bind(('127.0.0.1', 0))",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')",
        "import os\nos.fork()",
        "import os\nos.system('true')",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nos.kill(os.getppid(), 9)",
        "import subprocess\nsubprocess.run(['true'])",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        "import ctypes",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        "import os\nos.listdir('/')\nopen(os.path.relpath('/etc/passwd')).read()",
        "open('note.txt', 'w')",
        "import os\nos.mkdir('folder')",
        "import shutil\nshutil.rmtree('/nowhere')",
    ],
)
def test_what_is_no_computation_is_refused(code: str) -> None:
    assert refused(code)


def test_no_file_of_the_user_is_read_changed_or_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    secret = tmp_path / ".ssh" / "id_ed25519"
    secret.parent.mkdir()
    secret.write_text("key")
    for call in (f"open({str(secret)!r}).read()", f"open({str(secret)!r}, 'w')", f"os.remove({str(secret)!r})"):
        assert refused(f"import os\n{call}")
    assert secret.read_text() == "key"


def test_nothing_of_our_environment_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_unique")
    code = "import os\ndef held():\n    return set(os.environ)"
    assert (
        sandbox.run(code, "assert held() <= {'LC_ALL', 'TZ', 'LD_LIBRARY_PATH', 'HF_HUB_DISABLE_TELEMETRY'}") == PASSES
    )


def test_there_is_nothing_to_read_and_nowhere_to_print() -> None:
    code = "import sys\ndef read():\n    return sys.stdin.read()\nfor _ in range(1000):\n    print('x' * 100_000)"
    assert sandbox.run(code, "assert read() == ''") == PASSES


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import signal\nwhile True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "x = 9 ** 9 ** 9",
        "def double(x):\n    return double(x)",
        "x = 'a' * 10**10",
        "x = []\nwhile True: x.append('a' * 10**6)",
        "import threading\nwhile True: threading.Thread(target=threading.Event().wait).start()",
        "import time\ntime.sleep(99)",
    ],
)
def test_one_that_runs_away_is_ended(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 1)
    others, started = children_of(os.getpid()), time.monotonic()
    assert sandbox.run(code, TESTS) == FAILS
    assert time.monotonic() - started < 10
    assert children_of(os.getpid()) <= others


@pytest.mark.parametrize("bomb", ["'a' * 10**10", "[0] * 10**9", "list(range(10**8))"])
def test_memory_ends_at_its_limit(bomb: str) -> None:
    code = f"def tried():\n    try:\n        {bomb}\n    except MemoryError:\n        return True"
    assert sandbox.run(code, "assert tried()") == PASSES


def test_the_kernel_ends_what_uses_too_much_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process of a namespace ignores SIGXCPU, which a soft limit sends."""
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 120)
    started = time.monotonic()
    assert sandbox.run("while True: pass", TESTS) == FAILS
    assert time.monotonic() - started < 60


def test_threads_that_go_on_end_with_the_answer() -> None:
    code = "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()\n" + DOUBLE
    others, started = children_of(os.getpid()), time.monotonic()
    assert sandbox.run(code, TESTS) == PASSES
    assert time.monotonic() - started < 10
    assert children_of(os.getpid()) <= others


def test_it_is_alone() -> None:
    """Whether or not the hook holds: these are the kernel's."""
    if not sandbox._alone():
        pytest.skip("this system gives no user namespaces")
    alone = "import os, socket\ndef seen():\n    return os.getpid(), [name for _, name in socket.if_nameindex()]"
    assert sandbox.run(alone, "assert seen() == (1, ['lo'])") == PASSES


def test_it_runs_where_there_are_no_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_alone", lambda: ())
    assert sandbox.run(DOUBLE, TESTS) == PASSES
    assert refused("import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)")


def test_code_finds_what_its_tests_define() -> None:
    code = "def double(x):\n    return twice(x)"
    assert sandbox.run(code, "def twice(x):\n    return 2 * x\n" + TESTS) == PASSES


def test_answers_may_be_run_by_several_threads() -> None:
    verdicts: list[ProgramRun] = []
    threads = [threading.Thread(target=lambda: verdicts.append(sandbox.run(DOUBLE, TESTS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [PASSES] * 4


def test_long_tests_reach_an_answer_that_never_reads_them() -> None:
    """A pipe holds 64 KiB: the parent would wait for a child that waits for nothing."""
    tests = TESTS + "\n" + "# x\n" * 100_000
    assert sandbox.run(DOUBLE, tests) == PASSES
    assert sandbox.run("raise SystemExit", tests) == FAILS


def test_a_child_that_does_not_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "OUR_FOLDER", "/nowhere")
    with pytest.raises(
        MachineError, match=r"The process that runs answers does not start\. It is .*sandbox_worker\.py"
    ):
        sandbox.run(DOUBLE, TESTS)


def test_other_systems_are_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(MachineError, match="only Linux has"):
        sandbox.refuse_elsewhere()
