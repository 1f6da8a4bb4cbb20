"""`qtune` as a person uses it, each verb a process: a demo run, one that is stopped and goes on, merges, an export."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .lab import Figures, Lab

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS, STOPPED_AT = 30, 8
SHORT = {"train.max_steps": STEPS, "data.max_rows": 200, "evaluate.rows": 16, "train.eval_every": STEPS}
ON_THE_HOST = {"memory.embedding": '"host"', "memory.stream_layers": 2, "memory.head": '"host"'}
PATIENCE_SECONDS = 120


class Command:
    """One that runs, watched by a thread, as it may end long before somebody asks."""

    def __init__(self, name: str, arguments: Sequence[object], said: Path):
        self.name, self.said = name, said
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "QTUNE_CACHE": "off"}
        with said.open("w", encoding="utf-8") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "qtune", *map(str, arguments)], stdout=stream, stderr=stream, env=environment
            )
        self.seconds = 0.0
        self._watch = threading.Thread(target=self._wait)
        self._watch.start()

    def _wait(self) -> None:
        start = time.perf_counter()
        try:
            self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.seconds = time.perf_counter() - start

    def ended(self, wanted: Sequence[int] = (0,)) -> Figures:
        """How it ended, waited for; `wanted` are the exit codes that are as they should be."""
        self._watch.join()
        code = self.process.returncode
        lines = [line for line in self.said.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return {
            "what": self.name,
            "ok": code in wanted,
            "exit": code,
            "took_seconds": self.seconds,
            "seen": "" if code in wanted else " ".join(lines[-3:])[-300:],
        }

    def stop_after(self, journal: Path, steps: int) -> None:
        """Ctrl-C, once the run at work has told of so many steps."""
        ends = time.monotonic() + PATIENCE_SECONDS
        while self.process.poll() is None and time.monotonic() < ends:
            text = journal.read_text(encoding="utf-8") if journal.is_file() else ""
            if len(re.findall(r'"event": ?"step"', text)) >= steps:
                self.process.send_signal(signal.SIGINT)
                return
            time.sleep(0.05)


def verb_rows(lab: Lab) -> Iterator[Figures]:
    """Exit codes and seconds; those that do not need each other run beside each other."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)

        def begin(name: str, *arguments: object) -> Command:
            return Command(name, arguments, here / f"{name.replace(' ', '_')}.txt")

        short = lab.some([{**SHORT, "train.max_steps": 12, "data.max_rows": 60, "evaluate.rows": 2}, SHORT])[-1]
        one, two = here / "one", here / "two"
        whole = begin("run", *run_of(one, short))
        yield whole.ended()
        stopped = begin("run stopped", *run_of(two, {**short, **ON_THE_HOST}))
        merged = begin("merge", "merge", one, "--output", here / "merged")
        stopped.stop_after(two / "metrics.jsonl", min(STOPPED_AT, short["train.max_steps"] // 2))
        yield stopped.ended((0, 130))
        resumed = begin("resume", "resume", two)
        yield merged.ended()
        exported = begin("export", "export", one, "--output", here / "exported")
        yield resumed.ended()
        merged_two = begin("merge with weights on the host", "merge", two, "--output", here / "merged_two")
        yield exported.ended()
        yield merged_two.ended()


def run_of(folder: Path, settings: dict[str, object]) -> list[object]:
    """Arguments of a demo run that leaves all in `folder`."""
    asked = [argument for key, value in settings.items() for argument in ("--set", f"{key}={value}")]
    return ["run", "medical", "--demo", "--output", folder, *asked]
