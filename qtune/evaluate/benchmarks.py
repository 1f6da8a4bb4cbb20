"""Public benchmarks through EleutherAI's lm-eval, on a model that is loaded already.

Settings are lm-eval's own, so that scores can be held against published ones: its prompts, its number of examples, no
chat template.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtune.errors import MachineError, OutOfMemory, UserError, how_to_install

if TYPE_CHECKING:
    from qtune.model.loaded import Loaded

FEWSHOT_SEED = 1234  # lm-eval's own
BATCH_SIZES = (8, 1)  # the second where the first does not fit


@dataclass(frozen=True)
class Result:
    """One figure of one task; `stderr` is None where lm-eval gives none."""

    task: str
    metric: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class Benchmarks:
    """Tasks whose data is here; `manager` is lm-eval's."""

    names: tuple[str, ...]
    manager: Any

    @classmethod
    def open(cls, names: Sequence[str], folder: Path | None) -> "Benchmarks":
        """Find the tasks and get their data; `folder` may hold task files of one's own.

        Raises MachineError where lm-eval is not installed or the data cannot be had, UserError for an unknown task.
        """
        refuse_absent(folder)
        manager = _manager(names, folder)
        for name in names:
            _refuse_unknown(name, manager.all_tasks)
        for name in names:
            _get_data(name, manager)
        return cls(tuple(names), manager)

    def run(self, loaded: "Loaded", limit: int | None) -> list[Result]:
        """Every task on the model as it stands, `limit` rows of each at the most.

        Raises OutOfMemory where one row does not fit.
        """
        import torch
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        from qtune.memory.oom_recovery import free_memory, is_out_of_memory, let_go

        model, tokenizer = loaded.without_peft, loaded.tokenizer
        dtype = None if loaded.compute_dtype == "float32" else loaded.compute_dtype
        on = torch.device(loaded.device)
        for batch_size in BATCH_SIZES:
            try:
                asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, mixed_precision_dtype=dtype)
                asked._device = on  # lm-eval takes the first parameter's, which may wait on the host
                return results_of(
                    evaluate(lm=asked, task_dict=self._tasks(), limit=limit, log_samples=False)["results"]
                )
            except Exception as fault:
                if not is_out_of_memory(fault):
                    raise
                let_go(fault)
                free_memory()
        raise OutOfMemory(
            "Memory ran out while one row of a benchmark was read. Leave out the task with the longest rows."
        )

    def _tasks(self) -> Any:
        """The tasks with the settings that lm-eval's own command gives them where their files say nothing.

        That command (`simple_evaluate`) would also ask git and pip about this machine, and print what they answer.
        """
        loaded = self.manager.load(list(self.names))
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return loaded


def refuse_absent(folder: Path | None) -> None:
    """Raises MachineError where lm-eval is not installed, UserError for a folder of tasks that is not there."""
    if find_spec("lm_eval") is None:
        raise MachineError(f"--tasks: needs lm-eval, which is not installed: {how_to_install('eval')}")
    if folder is not None and not folder.is_dir():
        raise UserError(f"--task-folder: there is no folder {folder}.")


def results_of(found: dict[str, dict[str, Any]]) -> list[Result]:
    """lm-eval's figures, which it calls `acc,none` and `acc_stderr,none`; those with a filter keep its name."""
    results = []
    for task, figures in found.items():
        for key, value in figures.items():
            metric, _, kept = key.partition(",")
            if not kept or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = figures.get(f"{metric}_stderr,{kept}")
            name = metric if kept == "none" else f"{metric} ({kept})"
            results.append(Result(task, name, float(value), float(stderr) if isinstance(stderr, int | float) else None))
    return results


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's index of tasks; its own thousands, which take seconds, only where `folder` has not all the names."""
    from lm_eval.tasks import TaskManager

    if folder is None:
        return TaskManager()
    own = TaskManager(include_path=str(folder), include_defaults=False)
    return own if set(names) <= set(own.all_tasks) else TaskManager(include_path=str(folder))


def _refuse_unknown(name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else " `lm-eval ls tasks` lists them."
        raise UserError(f"--tasks: lm-eval has no task {name}.{hint}")


def _get_data(name: str, manager: Any) -> None:
    try:
        manager.load([name])
    except Exception as fault:  # a task is a program with data of its own, and fails in as many ways
        told = (str(fault).strip() or type(fault).__name__).splitlines()[0].rstrip(".")
        raise MachineError(
            f"--tasks: the data of {name} cannot be had ({told}). Run it once where there is a network, which keeps it,"
            " or name a task of your own with --task-folder."
        ) from None
