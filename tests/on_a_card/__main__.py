"""Tests of the real code on the card of `support/card.py`: `python tests/on_a_card [FILES AND OPTIONS OF PYTEST]`.

They run in a process of their own, as a kind of device is registered once and for good; so none is named `test_*.py`.
`tests/test_on_a_card.py` starts them with all others.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(HERE.parent / "support"), str(HERE.parent.parent)]

import card  # noqa: E402
import pytest  # noqa: E402

if __name__ == "__main__":
    card.install()
    given = sys.argv[1:]
    files = [] if any(".py" in argument for argument in given) else sorted(map(str, HERE.glob("[!_]*.py")))
    raise SystemExit(pytest.main([*given, *files, "-p", "no:cacheprovider"]))
