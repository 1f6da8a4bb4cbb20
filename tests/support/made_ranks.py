"""Several real processes of one run on this machine, over gloo."""

import os
import signal
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked import Forked

TORCHRUNS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PREAMBLE = """
import json, sys
sys.path[:0] = {paths!r}
from qtune.distributed.launched import Launched
from qtune.distributed.ranks import Ranks
from {module} import {name}
ranks = Ranks.join(Launched.taken())
{name}(ranks, *json.loads({given!r}))
ranks.leave()
"""


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def environment(rank: int, size: int, port: int, **more: str) -> dict[str, str]:
    """What torchrun would set, but for its store: rank 0 keeps one."""
    values = (rank, size, rank, size, "127.0.0.1", port)
    return {**os.environ, **dict(zip(TORCHRUNS, map(str, values), strict=True)), **more}


@dataclass
class Ended:
    returncode: int
    out: str


class Launch:
    """`python ARGUMENTS` in `size` processes that find each other."""

    def __init__(self, size: int, arguments: list[str], cwd: Path | None = None, env: Mapping[str, str] | None = None):
        port = free_port()
        self._files = [tempfile.TemporaryFile() for _ in range(size)]  # noqa: SIM115  (`wait` closes them)
        with open(os.devnull) as nothing:
            self.processes = [
                Forked(
                    arguments,
                    [nothing.fileno(), file.fileno(), file.fileno()],
                    cwd,
                    environment(rank, size, port, **(env or {})),
                )
                for rank, file in enumerate(self._files)
            ]

    def wait(self, seconds: float = 240) -> list[Ended]:
        """How each ended, with all that it printed; whoever has not ended by then is killed."""
        try:
            codes = [process.wait(seconds) for process in self.processes]
        finally:
            for process in self.processes:
                if process.returncode is None:
                    os.kill(process.pid, signal.SIGKILL)
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read().decode())
            file.close()
        return [Ended(code, text) for code, text in zip(codes, texts, strict=True)]


def launch(size: int, task: Callable[..., Any], *given: Any, **env: str) -> Launch:
    """`task(ranks, *given)`, a function of a test's module, in every rank; `given` is JSON."""
    import json

    file = Path(task.__code__.co_filename)
    here = Path(__file__).parent
    paths = [str(file.parent), str(here), str(here.parent)]
    code = PREAMBLE.format(paths=paths, module=file.stem, name=task.__name__, given=json.dumps(given))
    return Launch(size, ["-c", code], env={"QTUNE_RANKS_LIMIT": "60s", **env})


def all_well(launched: Launch) -> None:
    for ended in launched.wait():
        assert ended.returncode == 0, ended.out
