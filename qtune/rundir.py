"""The run folder: its file names, its only reader and its only writer.

recipe.toml      the recipe as given, byte for byte      data.json       rows, tokens, what was cut or dropped
plan.json        every settled choice, with its reason   scores.json     before and after, with sample answers
lock.json        base, data and template hashes,         summary.md      the run on one page
                 versions, seed                          log.txt         what the libraries said
metrics.jsonl    one event a line                        adapter/        a standard PEFT folder
memory.jsonl     bytes by part, one step a line          merge.json      the verdict of the last merge
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from qtune.errors import RunFolderError
from qtune.events import EVENT_BY_NAME, Event, MemoryMeasured, Rehearsed

_NAME_BY_EVENT = {event: name for name, event in EVENT_BY_NAME.items()}


@dataclass(frozen=True)
class RunDir:
    """A run folder at `path`; `create` makes one, `open` reads one that is there."""

    path: Path

    @classmethod
    def create(cls, path: Path, recipe_text: str) -> "RunDir":
        """Make a new folder with the recipe in it; one that holds anything already is refused."""
        if is_used(path):
            raise RunFolderError(f"{path}: is not empty, and runs are never mixed. Name another --output.")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise RunFolderError(f"{path}: cannot be created ({fault.strerror}). Name another --output.") from None
        run = cls(path)
        run.recipe.write_text(recipe_text, encoding="utf-8")
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDir":
        """The run at `path`; says what is missing when it is no run folder."""
        if not path.is_dir():
            raise RunFolderError(f"{path}: there is no such run folder.{_runs_here()}")
        run = cls(path)
        if not run.lock.is_file():
            raise RunFolderError(f"{path}: is no run folder, it has no {run.lock.name}.{_runs_here()}")
        return run

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock.json"

    @property
    def data(self) -> Path:
        return self.path / "data.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def memory(self) -> Path:
        return self.path / "memory.jsonl"

    @property
    def scores(self) -> Path:
        return self.path / "scores.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.md"

    @property
    def merge(self) -> Path:
        return self.path / "merge.json"

    @property
    def probe(self) -> Path:
        return self.path / "probe.json"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def record(self, event: Event) -> None:
        """Append one event. Bytes go to memory.jsonl, as they differ from run to run; the rest to metrics.jsonl."""
        path = self.memory if isinstance(event, MemoryMeasured | Rehearsed) else self.metrics
        line = json.dumps({"event": _NAME_BY_EVENT[type(event)], **dataclasses.asdict(event)}, ensure_ascii=False)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def events(self) -> Iterator[Event]:
        """Every event of the run: metrics.jsonl in order, then memory.jsonl.

        What stands behind the last line feed was never finished, and is left out.
        """
        for path in (self.metrics, self.memory):
            finished = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
            for line in finished:
                values = json.loads(line)
                kind = EVENT_BY_NAME[values.pop("event")]
                if kind is MemoryMeasured:
                    values["parts"] = tuple((name, size) for name, size in values["parts"])
                if kind is Rehearsed:
                    values["climbed"] = tuple(values["climbed"])
                yield kind(**values)


def is_used(path: Path) -> bool:
    """Whether something is there that writing a new folder would mix with: a file, or a folder that is not empty."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def default_path(name: str, now: datetime) -> Path:
    """`runs/medical-20261124-081500`, under the current folder."""
    return Path("runs") / f"{name}-{now:%Y%m%d-%H%M%S}"


def write_json(path: Path, value: Any) -> None:
    """Write `value` whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write beside `path`, flush to disk, then rename over it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(name, 0o644)
    os.replace(name, path)


def read_json(path: Path) -> Any:
    """The JSON at `path`; a missing or broken file is named."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(f"{path}: is missing. The run did not get that far, or the file was removed.") from None
    except ValueError as fault:
        raise RunFolderError(f"{path}: is not readable JSON ({fault}).") from None


def _runs_here() -> str:
    """` Runs here: a, b.` for a message about a folder that is not one."""
    folders = sorted((p.parent for p in Path("runs").glob("*/lock.json")), key=lambda p: p.stat().st_mtime)
    return f" Runs here: {', '.join(str(p) for p in folders[-5:])}." if folders else ""
