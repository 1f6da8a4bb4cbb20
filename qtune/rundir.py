"""The run folder: its file names, its only reader and its only writer.

recipe.toml      the recipe as given, byte for byte      data.json       rows, tokens, what was cut or dropped
plan.json        every settled choice, with its reason   scores.json     before and after, with sample answers
lock.json        base, data and template hashes,         summary.md      the run on one page
                 versions, seed                          log.txt         what the libraries said
metrics.jsonl    one event a line                        adapter/        a standard PEFT folder
memory.jsonl     bytes by part, one step a line          merge.json      the verdict of the last merge
history.jsonl    checkpoints, interruptions, resumes     checkpoints/    to go on from, the newest and the best
invocation.json  the command line, to resume with        base_score.json the score before training
report.html      the run as a page, where asked for      export*.json    proofs of what was exported
eval-*.json      scores of `qtune eval`                  ranks/           what each further rank of several tells

metrics.jsonl is the same for a run that was interrupted and one that was not; what differs is kept in history.jsonl.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from qtune import __version__, atomic_files
from qtune.errors import RunFolderError
from qtune.events import (
    EVENT_BY_NAME,
    Answered,
    CheckpointSaved,
    Evaluated,
    Event,
    MemoryMeasured,
    RanksStanding,
    Rehearsed,
    Resumed,
    Stopping,
)
from qtune.lock import Lock

MERGE_REPORT = "merge_report.json"  # in a merged model's folder, what merge.json is in the run's
HELD = ".held"  # locked by the process that is at work in a folder
RANKS = "ranks"
RUNS = Path("runs")  # where a run goes that is given no --output
_NAME_BY_EVENT = {event: name for name, event in EVENT_BY_NAME.items()}
T = TypeVar("T")


@dataclass(frozen=True)
class RunDir:
    """A run folder at `path`; `create` makes one, `open` reads one that is there.

    `base` is where the base is now, if that is not where the lock has it; whoever reads the lock finds it there.
    """

    path: Path
    base: Path | None = None

    @classmethod
    def create(cls, path: Path, recipe_text: str, invocation: dict[str, Any]) -> "RunDir":
        """Make a new folder with the recipe, and how it was given, in it; one that holds anything is refused."""
        refuse_used(path)
        try:
            with atomic_files.filled_in_place(path, replaces=False) as stage:
                cls(stage).recipe.write_text(recipe_text, encoding="utf-8")
                write_json(cls(stage).invocation, invocation)
        except OSError as fault:
            raise RunFolderError(f"{path}: cannot be created ({fault.strerror}). Name another --output.") from None
        return cls(path)

    @classmethod
    def open(cls, path: Path, base: Path | None = None) -> "RunDir":
        """The run at `path`, whose base may be elsewhere now; says what is missing when it is no run folder."""
        if not path.is_dir():
            raise RunFolderError(f"{path}: there is no such run folder.{_runs_here()}")
        run = cls(path, base.absolute() if base else None)
        if not run.lock.is_file():
            raise RunFolderError(f"{path}: is no run folder, it has no {run.lock.name}.{_runs_here()}")
        _refuse_links(path)
        return run

    @classmethod
    def open_to_resume(cls, path: Path) -> "RunDir":
        """The run at `path`, which may have been stopped before it had a lock."""
        run = cls(path)
        if not run.invocation.is_file():
            return cls.open(path)
        _refuse_links(path)
        return run

    def of_rank(self, rank: int) -> "RunDir":
        """Where a rank keeps what it tells; the first has the run's own folder."""
        return self if rank == 0 else RunDir(self.ranks / f"{rank:04}", self.base)

    @property
    def whole_run(self) -> "RunDir":
        """The run of which this is a rank's folder, or the whole."""
        return RunDir(self.path.parent.parent, self.base) if self.path.parent.name == RANKS else self

    @property
    def ranks(self) -> Path:
        return self.path / RANKS

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
    def page(self) -> Path:
        return self.path / "report.html"

    def read_as(self, path: Path, make: Callable[[Any], T]) -> T:
        """What `make` makes of the JSON at `path`, a file of this run.

        Raises RunFolderError where it is missing, and where `make` finds other fields than it knows: another version of
        qtune wrote them, or they were changed by hand.
        """
        values = read_json(path)
        try:
            return make(values)
        except (LookupError, TypeError, ValueError, AttributeError):
            raise self.not_as_written(path) from None

    def read_lock(self) -> Lock:
        """What the run stood on when it began. Raises RunFolderError as `read_as` does."""
        return self.of_lock(lambda lock: lock)

    def of_lock(self, make: Callable[[Lock], T]) -> T:
        """What `make` makes of the lock, whose base is where it is now. Raises RunFolderError as `read_as` does."""

        def made(values: dict[str, Any]) -> T:
            lock = Lock.from_json(values)
            return make(lock if self.base is None else lock.with_base_in(self.base))

        return self.read_as(self.lock, made)

    def write_lock(self, lock: Lock) -> None:
        write_json(self.lock, lock.as_json())

    @property
    def qtune_version(self) -> str | None:
        """The version of qtune that wrote this run; None where it is one that did not say, or has no lock yet."""
        try:
            return str(read_json(self.lock)["versions"]["qtune"])
        except (RunFolderError, LookupError, TypeError):
            return None

    def not_as_written(self, place: str | Path) -> RunFolderError:
        """The refusal of `place`, a file or a line of one, which holds something else than this version writes."""
        writer = self.qtune_version
        if writer == __version__:
            return RunFolderError(f"{place}: is not as qtune wrote it; it was changed since.")
        named = f"qtune {writer}" if writer else "a qtune that did not note its version"
        return RunFolderError(
            f"{place}: was written by {named}, and qtune {__version__} cannot read it. Use the version that wrote it."
        )

    def export_report(self, name: str) -> Path:
        """Where the proof of the export into a folder called `name` is kept."""
        return self.path / f"export-{name}.json"

    def evaluation(self, name: str) -> Path:
        """Where the scores of a later evaluation are kept: rows or tasks."""
        return self.path / f"eval-{name}.json"

    @property
    def probe(self) -> Path:
        return self.path / "probe.json"

    @property
    def history(self) -> Path:
        return self.path / "history.jsonl"

    @property
    def invocation(self) -> Path:
        return self.path / "invocation.json"

    @property
    def base_score(self) -> Path:
        return self.path / "base_score.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def checkpoint_request(self) -> Path:
        """A file of this name, put there by the user, asks for a checkpoint at the next step."""
        return self.path / "CHECKPOINT"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def record(self, event: Event) -> None:
        """Append one event: bytes to memory.jsonl, as they differ from run to run, what only an interrupted run has to
        history.jsonl, the rest to metrics.jsonl. Raises DiskFull."""
        if isinstance(event, Stopping):
            return
        if isinstance(event, MemoryMeasured | Rehearsed | RanksStanding):
            self._append(self.memory, event)
        elif isinstance(event, CheckpointSaved | Resumed):
            self._append(self.history, event)
        else:
            self._append(self.metrics, event)

    def record_again(self, event: Event) -> None:
        """Append an event of a resumed run that repeats what was recorded before: it goes to history.jsonl."""
        self._append(self.history, event)

    def _append(self, path: Path, event: Event) -> None:
        line = json.dumps({"event": _NAME_BY_EVENT[type(event)], **dataclasses.asdict(event)}, ensure_ascii=False)
        with atomic_files.refusing_full_disk(path), path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def journal_bytes(self) -> dict[str, int]:
        """How long the journals are that a checkpoint winds back, flushed to disk first."""
        journals = [path for path in (self.metrics, self.memory) if path.is_file()]
        for path in journals:
            atomic_files.flush(path)
        return {path.name: path.stat().st_size for path in journals}

    @property
    def checkpoints_removed(self) -> Path:
        """There where the run had checkpoints and the user took them off the disk."""
        return self.path / "checkpoints.removed"

    def held(self) -> AbstractContextManager[None]:
        """Raises RunFolderError, on entering, where another process is at work in this folder."""
        return alone_in(self.path, f"{self.path}: another qtune is at work on this run. Wait for it.")

    @property
    def is_held(self) -> bool:
        """Whether a process is at work in this folder now."""
        with contextlib.suppress(FileNotFoundError), (self.path / HELD).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    def wind_back(self, journal_bytes: Mapping[str, int]) -> None:
        """Cut the journals to the lengths of `journal_bytes`, and remove those it does not name.

        What a write that was cut short has left goes too. Raises RunFolderError for a journal that is shorter.
        """
        self._remove_leftovers()
        for path in (self.metrics, self.memory):
            if path.name not in journal_bytes:
                path.unlink(missing_ok=True)
            elif not path.is_file() or path.stat().st_size < journal_bytes[path.name]:
                raise RunFolderError(
                    f"{path}: was cut or removed after the checkpoint was written, so the run cannot go on with it."
                )
            else:
                os.truncate(path, journal_bytes[path.name])

    def _remove_leftovers(self) -> None:
        for name in (self.adapter.name, "*.json", self.summary.name):
            for path in self.path.glob(f".{name}.*"):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        if self.history.is_file():
            os.truncate(self.history, self.history.read_bytes().rfind(b"\n") + 1)

    def events(self) -> Iterator[Event]:
        """Every event of the run: metrics.jsonl in order, then memory.jsonl, then history.jsonl.

        What stands behind the last line feed was never finished, and is left out.
        """
        for path in (self.metrics, self.memory, self.history):
            finished = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.is_file() else []
            for number, line in enumerate(finished, start=1):
                try:
                    yield _event_of(line)
                except json.JSONDecodeError:
                    raise RunFolderError(f"{path}:{number}: is no event of a run; the file was changed.") from None
                except (LookupError, TypeError, ValueError, AttributeError):
                    raise self.not_as_written(f"{path}:{number}") from None


def _event_of(line: str) -> Event:
    values = json.loads(line)
    kind = EVENT_BY_NAME[values.pop("event")]
    if kind is MemoryMeasured:
        values["parts"] = tuple((name, size) for name, size in values["parts"])
        values.setdefault("is_rehearsal", values.get("phase", "").startswith("rehearsed "))  # as older runs said it
    if kind is Evaluated:
        values["by_source"] = tuple((name, loss) for name, loss in values.get("by_source", ()))
    if kind in (RanksStanding, Answered):
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if kind is Rehearsed:
        values["climbed"] = tuple(values["climbed"])
    return kind(**values)


def _refuse_links(folder: Path) -> None:
    """What is written to a run folder stays in it, wherever it came from."""
    link = next((path for path in sorted(folder.rglob("*")) if path.is_symlink()), None)
    if link is not None:
        raise RunFolderError(f"{link}: is a link, and a run folder holds none. Put what it leads to in its place.")


def refuse_used(path: Path) -> None:
    """Raises RunFolderError for a new folder where something is already, or where none can be made."""
    if is_used(path):
        raise RunFolderError(f"{path}: exists already and is not empty. Name another --output, or remove it.")
    refuse_unmakeable(path)


def refuse_unmakeable(path: Path) -> None:
    """Raises RunFolderError where no folder can be made."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "nothing may be written there" if above.is_dir() else "that is a file"
        raise RunFolderError(f"{path}: cannot be made in {above}: {why}. Name another --output.")


def is_run(folder: Path) -> bool:
    """Whether qtune made this folder for a run, be it one that never got as far as a lock."""
    run = RunDir(folder)
    return run.recipe.is_file() and (run.lock.is_file() or run.invocation.is_file())


def runs_in(folder: Path) -> Iterator[RunDir]:
    """`folder`, if it is a run, else every run below it; links and hidden folders are passed over."""
    if is_run(folder):
        yield RunDir(folder)
        return
    with contextlib.suppress(PermissionError, FileNotFoundError):
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
                yield from runs_in(path)


def bytes_below(folder: Path) -> int:
    """Of every file in `folder`; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def is_used(path: Path) -> bool:
    """Whether something is there that writing a new folder would mix with: a file, or a folder that is not empty."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


@contextmanager
def alone_in(folder: Path, refusal: str) -> Iterator[None]:
    """Raises RunFolderError with `refusal` where another process is inside such a block for the same folder."""
    with (folder / HELD).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunFolderError(refusal) from None
        yield


@contextmanager
def reading(*runs: RunDir) -> Iterator[None]:
    """What is done in such a block with a folder of another version of qtune, and fails as that has not what this one
    reads, raises a RunFolderError that says so."""
    try:
        yield
    except (LookupError, TypeError, AttributeError):
        for run in runs:
            if run.qtune_version != __version__:
                raise run.not_as_written(run.path) from None
        raise


def default_export(run: Path, to: str, quant: str | None) -> Path:
    """exports/RUN-q8_0, exports/RUN-ollama-q8_0 or exports/RUN-adapter."""
    kind = {"gguf": "", "ollama": "ollama-"}
    return Path("exports") / f"{run.resolve().name}-{kind[to] + (quant or 'q8_0') if to in kind else 'adapter'}"


def default_path(name: str, now: datetime) -> Path:
    """`runs/medical-20261124-081500`, under the current folder."""
    return RUNS / f"{name}-{now:%Y%m%d-%H%M%S}"


def write_json(path: Path, value: Any) -> None:
    """Write `value` whole or not at all. Raises DiskFull."""
    atomic_files.write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON at `path`; a missing or broken file is named."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(f"{path}: is missing. The run did not get that far, or the file was removed.") from None
    except ValueError as fault:
        raise RunFolderError(f"{path}: is not readable JSON ({fault}).") from None


def leaves(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested JSON objects, and lists of objects, that is no object itself, by its dotted name."""
    for name, value in values.items():
        if isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
            value = {str(number): each for number, each in enumerate(value)}
        if isinstance(value, Mapping):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _runs_here() -> str:
    """` Runs here: a, b.` for a message about a folder that is not one."""
    folders = sorted((p.parent for p in RUNS.glob("*/lock.json")), key=lambda p: p.stat().st_mtime)
    return f" Runs here: {', '.join(str(p) for p in folders[-5:])}." if folders else ""
