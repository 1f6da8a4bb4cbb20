"""What every lane works with: a tiny base with rows and a recipe, and qtune in child processes that are cheap to start.

The libraries are imported once, here; a child is a fork that finds them loaded.
"""

import fcntl
import functools
import gc
import json
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from compare_losses import differ, events
from conftest import byte_tokenizer, tiny_config
from transformers import LlamaForCausalLM

from qtune import cli
from qtune import ready as readiness
from qtune import run as story  # noqa: F401  (a child finds what it would import)
from qtune.distributed.ranks import Ranks
from qtune.plan.plan import Plan, Settled
from qtune.plan.planner import decide
from qtune.recipe.load import load
from qtune.rundir import RunDir

torch.set_num_threads(1)
gc.freeze()  # a child's collections need not walk the libraries

LONGEST_SECONDS = 120.0
MOST_PRINTED_BYTES = 1024**2
ROWS = 40
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "finds", "nothing", "lost")


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, -9 for one that was killed, and all it printed."""

    code: int
    text: str
    seconds: float

    @property
    def last_line(self) -> str:
        lines = self.text.strip().splitlines()
        return lines[-1] if lines else "nothing was printed"


class Child:
    """`qtune ARGUMENTS` in a process of its own; `prepare` runs in it first.

    It prints into a pipe with room for all that a run says: a file could fill up, as full disks are what we make.
    """

    def __init__(self, *arguments: str | Path, prepare: Callable[[], object] | None = None):
        self.began = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self._printed, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, MOST_PRINTED_BYTES)
        self.pid = os.fork()
        if self.pid == 0:
            _become_qtune([str(argument) for argument in arguments], writer, prepare)
        os.close(writer)

    def send(self, number: int) -> None:
        """Send a signal, unless the child has ended."""
        if self._poll() is None:
            os.kill(self.pid, number)

    _status: int | None = None

    def _poll(self) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def has_ended(self) -> bool:
        return self._poll() is not None

    def wait(self, seconds: float = LONGEST_SECONDS) -> Ended:
        """Wait for the end; one that takes longer is killed, and its text says so."""
        until = self.began + seconds
        while self._poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        hung = self._poll() is None
        if hung:
            os.killpg(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self._status = os.waitstatus_to_exitcode(status)
        with os.fdopen(self._printed, encoding="utf-8", errors="replace") as printed:
            text = printed.read() + (f"\nhung for {seconds:.0f} s" if hung else "")
        assert self._status is not None
        return Ended(self._status, text, time.monotonic() - self.began)


def _become_qtune(arguments: list[str], writer: int, prepare: Callable[[], object] | None) -> None:
    code = 99
    try:
        os.setpgid(0, 0)  # so that who hangs is killed with all that it has started
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        torch.set_num_threads(1)  # torch's pool does not come through a fork, and threads would race to make it anew
        if prepare is not None:
            prepare()
        code = cli.main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 99
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def qtune(*arguments: str | Path, prepare: Callable[[], object] | None = None) -> Ended:
    return Child(*arguments, prepare=prepare).wait()


@dataclass(frozen=True)
class Workshop:
    """A folder with a base, rows, and the recipes of a lane."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, seed: int = 0) -> "Workshop":
        """Base and rows are a function of `seed` alone."""
        shop = cls(folder)
        torch.manual_seed(seed)
        LlamaForCausalLM(tiny_config()).save_pretrained(shop.base)
        byte_tokenizer().save_pretrained(shop.base)
        rng = random.Random(seed)
        lines = [json.dumps({"question": _words(rng), "answer": _words(rng)}) for _ in range(ROWS)]
        (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return shop

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def recipe(self, name: str = "lab", counts: Iterable[int] = (1,), **changes: dict[str, Any]) -> Path:
        """A recipe file over base and rows, some of its settings replaced, by table; for `counts` of ranks."""
        tables: dict[str, dict[str, Any]] = {
            "model": {"base": str(self.base)},
            "lora": {"rank": 64, "alpha": 64, "dropout": 0.1, "targets": ["q_proj", "o_proj"]},
            "data": {"train": "rows.jsonl", "held_out_fraction": 0.1, "max_tokens": 192},
            "train": {"epochs": 4, "gradient_accumulation": 2, "learning_rate": 1e-3, "eval_every": 4},
            "save": {"every": 3},
            "evaluate": {"metric": "token_f1", "rows": 2, "max_new_tokens": 4},
        }
        for table, values in changes.items():
            tables[table] = {**tables.get(table, {}), **values}
        text = f'name = "{name}"\n'
        for table, values in tables.items():
            text += f"[{table}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        path = self.folder / f"{name}.toml"
        path.write_text(text, encoding="utf-8")
        _settle_ahead(path, counts)
        return path

    def run(self, recipe: Path, name: str, prepare: Callable[[], object] | None = None) -> Ended:
        return self.start(recipe, name, prepare).wait()

    def start(self, recipe: Path, name: str, prepare: Callable[[], object] | None = None) -> Child:
        """A new run in the folder `name`, or the same one again where it was stopped."""
        path = self.folder / name
        resumes = RunDir(path).invocation.is_file()
        arguments = ("resume", path) if resumes else ("run", recipe, "--output", path)
        return Child(*arguments, prepare=prepare)

    def undisturbed(self, recipe: Path, name: str = "undisturbed") -> Ended:
        """A whole run to hold others against. Raises RuntimeError where it fails."""
        ended = self.run(recipe, name)
        if ended.code != 0:
            raise RuntimeError(f"an undisturbed run ended with {ended.code}: {ended.text[-2000:]}")
        return ended

    def clear(self, name: str) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)


_plans: dict[str, Plan] = {}


@functools.wraps(decide)
def _decide_once(
    recipe: Any, device: Any, config: Any, work: Any, settled: Settled | None = None, **several: Any
) -> Plan:
    key = f"{recipe.model_dump_json()} {settled} {several}"
    if key not in _plans:
        _plans[key] = decide(recipe, device, config, work, settled, **several)
    return _plans[key]


def _settle_ahead(path: Path, counts: Iterable[int]) -> None:
    """Have the plan of a recipe, and of a run of it that goes on, before the children ask: it is half of their time,
    and nothing is written meanwhile."""
    recipe = load(path)
    for count in counts:
        ranks = Ranks(size=count, hosts=("here",) * count)
        plan = readiness.get_ready(recipe, ranks=ranks).plan
        readiness.get_ready(recipe, Settled(plan.techniques, plan.micro_batch), ranks=ranks)


readiness.decide = _decide_once


def _words(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 9)))


def isolated(cases: int, judge: Callable[[int], str | None], seconds: float) -> Iterator[str | None]:
    """What `judge` says of each case, asked in a child: one that dies of a case, or hangs for `seconds`, is a fault."""
    case = 0
    while case < cases:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            _judge_from(case, cases, judge, writer)
        os.close(writer)
        with os.fdopen(reader, "rb", buffering=0) as verdicts:
            while case < cases and (line := _line_within(verdicts, seconds)):
                yield json.loads(line)
                case += 1
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if case < cases:
            yield f"the process died of it or hung for {seconds:.0f} s (status {os.waitstatus_to_exitcode(status)})"
            case += 1


def _judge_from(first: int, cases: int, judge: Callable[[int], str | None], writer: int) -> None:
    try:
        torch.set_num_threads(1)
        for case in range(first, cases):
            try:
                verdict = judge(case)
            except BaseException as fault:
                verdict = f"{type(fault).__name__}: {fault}"
            os.write(writer, json.dumps(verdict).encode() + b"\n")
    finally:
        os._exit(0)


def _line_within(file: RawIOBase, seconds: float) -> bytes:
    """The next line, which is written whole or not at all; empty where there is none within `seconds`."""
    is_there, _, _ = select.select([file], [], [], seconds)
    return file.readline() if is_there else b""


def difference(one: Path, other: Path) -> str | None:
    """What two finished runs differ in beside times and the way they got there; None if in nothing."""
    told, told_too = events(one), events(other)
    for number, (mine, theirs) in enumerate(zip(told, told_too, strict=False), start=1):
        if differ(mine, theirs, 0.0):
            return f"event {number} differs: {mine} and {theirs}"
    if len(told) != len(told_too):
        return f"{len(told)} events and {len(told_too)}"
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "scores.json"):
        if (one / name).read_bytes() != (other / name).read_bytes():
            return f"{name} differs"
    return None


def left_over(run: Path) -> list[str]:
    """What there is in a finished run that only a write that was cut short leaves."""
    return [str(path.relative_to(run)) for path in run.rglob(".*") if path.name != ".held"]
