"""A forked Python is one that was started, for all that a test can tell."""

import os
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest

TOLD = (
    "import os, sys; print(sys.argv, os.getcwd(), sys.path[0], os.environ.get('A')); print(__name__, file=sys.stderr)"
)
ENDS = {
    "well": "print('fine')",
    "with a code": "print('bad'); raise SystemExit(3)",
    "with a sentence": "raise SystemExit('no such thing')",
    "at an exit that is registered": "import atexit; atexit.register(print, 'last')",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "by Ctrl-C": (  # which a process in the background of a shell has ignored since before it began
        "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        " os.kill(os.getpid(), signal.SIGINT)"
    ),
}


def started(*arguments: str | Path, **settings: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, **settings)


@pytest.mark.parametrize("how", [["-c", TOLD], ["-m", "told"], ["told.py"]], ids=["-c", "-m", "a script"])
def test_it_finds_its_arguments_folder_and_environment(how: list[str], tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(TOLD)
    env = {**os.environ, "A": "b"}
    one, other = (
        run([*how, "x", "-y"], cwd=tmp_path, env=env) for run in (forked.run, lambda a, **k: started(*a, **k))
    )
    assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)
    assert one.stdout


def test_all_that_ask_have_one_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process of the tests had its own, which imported everything once more."""
    server = "import os; print(open(f'/proc/{os.getppid()}/stat').read().rsplit(')')[-1].split()[1])"  # parent's parent
    first = forked.run(["-c", server]).stdout
    as_another = forked._server.__wrapped__()
    monkeypatch.setattr(forked, "_server", lambda: as_another)
    assert forked.run(["-c", server]).stdout == first


@pytest.mark.parametrize("how", ENDS)
def test_it_ends_alike(how: str) -> None:
    one, other = forked.run(["-c", ENDS[how]]), started("-c", ENDS[how])
    assert (one.returncode, one.stdout) == (other.returncode, other.stdout)
    assert one.stderr.splitlines()[-1:] == other.stderr.splitlines()[-1:]


def test_it_has_the_libraries_and_nothing_of_qtune() -> None:
    asked = "import sys; print([name in sys.modules for name in ('torch', 'transformers', 'peft', 'trl', 'qtune')])"
    assert forked.run(["-c", asked]).stdout == "[True, True, True, True, False]\n"


def test_code_has_names_of_its_own() -> None:
    """It wrote over those of what forks it, which could not end then."""
    assert forked.run(["-c", "code = asked = main = 7"]).returncode == 0


def test_a_variable_that_the_libraries_have_read_already_is_refused() -> None:
    with pytest.raises(ValueError, match="HF_HOME"):
        forked.run(["-c", ""], env={**os.environ, "HF_HOME": "elsewhere"})


def test_nobody_waits_for_what_it_has_closed() -> None:
    with open(os.devnull) as nothing:
        reader, writer = os.pipe()
        child = forked.Forked(["-c", "print(1)"], (nothing.fileno(), writer, writer))
    os.close(writer)
    with os.fdopen(reader) as printed:
        assert printed.read() == "1\n"
    assert child.wait(timeout=20) == child.wait() == 0


def test_waiting_for_one_that_takes_long_has_an_end() -> None:
    with open(os.devnull, "r+b") as nothing:
        child = forked.Forked(["-c", "import time; time.sleep(60)"], (nothing.fileno(),) * 3)
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(timeout=0.05)
    assert time.monotonic() - began < 10
    os.kill(child.pid, 9)
    assert child.wait(timeout=20) == -9
