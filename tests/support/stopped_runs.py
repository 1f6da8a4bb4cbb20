"""Real runs of the tiny base, in this process, that are stopped, damaged and resumed."""

import dataclasses
import functools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qtune import cli
from qtune import ready as readiness
from qtune.plan.planner import decide
from qtune.rundir import RunDir
from qtune.train.callbacks import Reporter
from qtune.train.trainer import MeteredTrainer

ROWS = 24
STEPS = 8
ADAPTER = "adapter/adapter_model.safetensors"
RECIPE = {
    "lora": {"rank": 64, "alpha": 64, "dropout": 0.1, "targets": ["q_proj"]},
    "data": {"train": "rows.jsonl", "held_out_fraction": 0.2, "max_tokens": 128, "packing": False},
    "train": {"epochs": 2, "gradient_accumulation": 5, "learning_rate": 3e-3, "eval_every": 3},
    "save": {"every": 2},
    "evaluate": {"metric": "none", "general": "none"},  # 16 passes, twice a run: test_rescore has one of its own
}


def recipe_text(base: Path, **changes: dict[str, Any]) -> str:
    tables: dict[str, dict[str, Any]] = {"model": {"base": str(base)}, **RECIPE}
    for table, values in changes.items():
        tables[table] = {**tables.get(table, {}), **values}
    lines = ['name = "t"']
    for table, values in tables.items():
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def write_recipe(folder: Path, base: Path, **changes: dict[str, Any]) -> Path:
    rows = [{"question": f"what is {'x' * (i % 9)}?", "answer": f"it is {i}"} for i in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "t.toml").write_text(recipe_text(base, **changes))
    return folder / "t.toml"


def qtune(*arguments: str | Path) -> int:
    """The exit code of a verb; what it does to this process's signals and environment is undone."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def copy(run: Path, to: Path, up_to: int | None = None) -> Path:
    """The run as it was when it had done `up_to` steps: later checkpoints, and what comes after training, are gone."""
    shutil.copytree(run, to)
    if up_to is not None:
        for name in ("adapter", "scores.json", "summary.md"):
            shutil.rmtree(to / name) if (to / name).is_dir() else (to / name).unlink(missing_ok=True)
        for path in (to / "checkpoints").iterdir():
            if int(path.name.removeprefix("step-")) > up_to:
                shutil.rmtree(path)
    return to


def without_times(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.endswith("_seconds")} for line in lines]


def assert_same(one: Path, other: Path) -> None:
    """Metrics equal but for times, adapters equal to the bit."""
    assert without_times(one) == without_times(other)
    assert (one / ADAPTER).read_bytes() == (other / ADAPTER).read_bytes()


def told(run: Path, kind: type) -> list[Any]:
    return [event for event in RunDir(run).events() if isinstance(event, kind)]


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


@contextmanager
def before_step(step: int, act: Callable[[], object]) -> Iterator[None]:
    """Do something when `step` is about to be taken."""
    get_batches = MeteredTrainer.get_batch_samples

    def act_and_get(self: MeteredTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            act()
        return get_batches(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeteredTrainer, "get_batch_samples", act_and_get)
        yield


def send(*numbers: signal.Signals) -> Callable[[], None]:
    def act() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return act


@contextmanager
def held_out_losses(*said: float) -> Iterator[None]:
    """These are measured, one after another, whatever the model is."""
    left, measured = iter(said), Reporter.evaluate

    def evaluate(reporter: Reporter, step: int) -> None:
        reporter.held_out = dataclasses.replace(reporter.held_out, of_all=lambda: (next(left), {}))
        measured(reporter, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "evaluate", evaluate)
        yield


@contextmanager
def plans_made_once() -> Iterator[None]:
    """A plan takes longer than a run of eight steps; it is the same each time for the same recipe."""
    kept: dict[str, Any] = {}

    @functools.wraps(decide)
    def decide_once(recipe: Any, device: Any, config: Any, work: Any, settled: Any = None, **several: Any) -> Any:
        key = f"{recipe.model_dump_json(exclude={'name', 'about'})} {settled} {several}"
        if key not in kept:
            kept[key] = decide(recipe, device, config, work, settled, **several)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readiness, "decide", decide_once)
        yield
