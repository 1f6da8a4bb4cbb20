"""Where qtune keeps what it can make again: in `$QTUNE_CACHE`, else in `~/.cache/qtune`; QTUNE_CACHE=off keeps nothing.

That is a variable and no key of the recipe because where files are kept is a matter of the machine: no run comes out
different for it.
"""

import os
from pathlib import Path

VARIABLE, OFF = "QTUNE_CACHE", "off"


def folder(kind: str) -> Path | None:
    """Where things of one kind stand; None where none are to be kept."""
    asked = os.environ.get(VARIABLE)
    if asked == OFF:
        return None
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return (Path(asked).expanduser() if asked else caches / "qtune") / kind
    except RuntimeError:  # nobody's home
        return None
