"""What `import qtune` offers, beside the making of recipes: data checked, runs planned, trained and opened again.

All of it works in somebody else's process: while a function is at work the libraries keep quiet and ask no network for
what is on this machine, and afterwards the process is as it was.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qtune import logs
from qtune.errors import MachineError, UserError
from qtune.fast_imports import quick_imports
from qtune.recipe import load, shipped_recipes
from qtune.recipe.schema import Recipe
from qtune.rundir import RunDir, read_json, refuse_used

if TYPE_CHECKING:
    from pandas import DataFrame

    from qtune.audit.thresholds import Checked
    from qtune.gguf.export import ExportReport, Target
    from qtune.gguf.writer import Quant
    from qtune.merge.merged_weights import DType, Onto
    from qtune.merge.verify import MergeVerdict
    from qtune.plan.planner import Plan
    from qtune.report.progress_line import Doing
    from qtune.report.run_list import State
    from qtune.report.run_record import Record

OFFLINE = "HF_HUB_OFFLINE"


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | None = None, demo: bool = False) -> Recipe:
    """The recipe file `name`, or the shipped recipe of that name such as "medical".

    `overrides` are settings by their full names, such as `{"train.epochs": 2}`; `demo` uses what its [demo] says.
    Raises RecipeError with every fault that is found.
    """
    given = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in (overrides or {}).items()]
    return load.load(shipped_recipes.find(str(name)), given, demo)


def check_data(recipe: Recipe, doing: "Doing | None" = None) -> "Checked":
    """Everything that is wrong with the rows, by file and line: its `outcome`, and each of its `findings`.

    Raises a UserError for rows that cannot be looked at.
    """
    with quick_imports():
        from qtune.audit.audit import audit
        from qtune.audit.run_refusals import refusals
        from qtune.audit.thresholds import judge
        from qtune.evaluate.forgetting import general_packs
        from qtune.evaluate.held_out import fault_asked
        from qtune.model.tokenizer import load_tokenizer
        from qtune.recipe.paths import GENERAL_WORDS
        from qtune.report.progress_line import Doing

    doing = doing or Doing()
    with at_work(*sources(recipe)):
        doing(f"reading {recipe.model.base}")
        tokenizer = load_tokenizer(recipe.model)
        if recipe.evaluate.general not in GENERAL_WORDS:
            general_packs(recipe.evaluate.general, tokenizer, recipe.data.max_tokens)  # a run refuses one without text
        doing(f"reading {recipe.data.train}")
        found = audit(recipe.data, tokenizer, doing.rows, fault_asked(recipe.evaluate))
        return judge(found, recipe.data, refusals(found, recipe, tokenizer))


def make_plan(
    recipe: Recipe,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    doing: "Doing | None" = None,
) -> "Plan":
    """How the run would fit, and what it costs, on this machine or on a card with `device_memory` ("8GiB", "RTX 4090",
    or bytes) in a host with `host_memory`; nothing but a config.json is downloaded. `plan.fits` says whether it does.

    Raises a UserError for anything that could not be trained on.
    """
    from qtune.gpu_models import memory_of

    try:
        asked, host = (memory_of(size) if isinstance(size, str) else size for size in (device_memory, host_memory))
    except ValueError as fault:
        raise UserError(f"{fault}.") from None
    with quick_imports():
        from qtune import hardware
        from qtune import ready as readiness
        from qtune.report.progress_line import Doing

    with at_work(*sources(recipe)):
        here = hardware.find_device()
        target = hardware.imagined_card(asked, host, here) if asked else hardware.with_host(here, host)
        return readiness.plan_without_downloads(recipe, target, doing or Doing())


def open_run(path: str | Path, base: str | Path | None = None) -> "Run":
    """A run by its folder; `base` is where its base is now, if it was moved. Raises RunFolderError for what is none."""
    return Run(RunDir.open(Path(path), None if base is None else Path(base)))


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, as its folder has it: what it lost, scored and answered, and what can be made of it."""

    folder: RunDir

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def state(self) -> "State":
        """ "finished", "stopped", "running" or "never began"."""
        from qtune.report.run_list import Listed

        return Listed.of(self.folder).state

    @property
    def losses(self) -> dict[int, float]:
        """Of training, by step: nats per trained token, the mean over the steps since the last one that is told."""
        return {done.step: done.loss for done in self._record.steps}

    @property
    def held_out_losses(self) -> dict[int, float]:
        return {measured.step: measured.loss for measured in self._record.held_out}

    @property
    def scores(self) -> dict[str, Any] | None:
        """Base and tuned on the held-out rows, as scores.json has them; None of a run without, or that was stopped."""
        return self._record.scores

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Held-out rows with what base and tuned answered."""
        return list((self.scores or {}).get("samples", ()))

    def frame(self) -> "DataFrame":
        """The steps as a pandas frame, by number: loss, held_out_loss, learning_rate, grad_norm, tokens and so on.

        Raises MachineError where pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise MachineError("Run.frame: needs pandas, which is not installed: pip install pandas") from None
        frame = pandas.DataFrame([dataclasses.asdict(done) for done in self._record.steps]).set_index("step")
        frame["held_out_loss"] = pandas.Series(self.held_out_losses, dtype="float64")
        return frame

    def evaluate(
        self,
        rows: int | None = None,
        samples: int | None = None,
        metric: str | None = None,
        data: str | Path | None = None,
        merged: Sequence[str | Path] = (),
    ) -> dict[str, Any]:
        """Base and tuned, and the `merged` folders and GGUF files, on the held-out rows or on those of the file `data`,
        as `qtune eval --json` prints it. Raises UserError for what cannot be asked, DataError for rows."""
        from qtune.evaluate.metrics import METRICS

        if metric is not None and metric not in METRICS:
            raise UserError(f"metric must be one of {', '.join(METRICS)}, and is {metric}.")
        with quick_imports():
            from qtune import rescore
            from qtune.report.progress_line import Doing

        asked = rescore.Asked(rows, samples, metric, None if data is None else Path(data))
        with self._in_use() as run:
            return rescore.on_rows(run, asked, [Path(path) for path in merged], Doing())

    def merge(
        self, output: str | Path, onto: 'Onto | Literal["auto"]' = "auto", dtype: "DType" = "auto"
    ) -> "MergeVerdict":
        """Fold the adapter into its base, in the new folder `output`, and say how close it is to what was trained.

        Raises VerificationFailed where it is not that model, and a UserError for what cannot be merged.
        """
        refuse_used(Path(output))
        with quick_imports():
            from qtune.merge.merge import merge_and_verify, refuse_unproven
            from qtune.report.progress_line import Doing

        with self._in_use() as run:
            _, verdict = merge_and_verify(run, Path(output), onto, dtype, Doing())
        refuse_unproven(output, verdict.faults)
        return verdict

    def export(
        self,
        output: str | Path | None = None,
        to: "Target" = "gguf",
        quant: "Quant | None" = None,
        onto: "Onto | None" = None,
    ) -> "ExportReport":
        """A GGUF file of the run, in the new folder `output`, held against the run; defaults as of `qtune export`.

        Raises VerificationFailed where it is not the model that was trained, and a UserError for what GGUF cannot say.
        """
        with quick_imports():
            from qtune.gguf.export import export
            from qtune.merge.merge import refuse_unproven

        with self._in_use() as run:
            rows = read_json(run.probe)
            report = export(run, None if output is None else Path(output), to, quant, onto, rows)
        refuse_unproven(report.output, report.faults)
        return report

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.state})"

    def _repr_markdown_(self) -> str:
        """What Jupyter shows: the run's summary."""
        return self.folder.summary.read_text(encoding="utf-8") if self.folder.summary.is_file() else repr(self)

    @cached_property
    def _record(self) -> "Record":
        from qtune.report.run_record import read

        return read(self.folder)

    @contextmanager
    def _in_use(self) -> Iterator[RunDir]:
        from qtune.model.fingerprint import refuse_unusable

        refuse_unusable(self.folder)
        with at_work(self.folder.read_lock().base_name):
            yield self.folder


def sources(recipe: Recipe) -> tuple[str | None, ...]:
    """What a run reads: its base and its rows, on this machine or by names of the hub."""
    return recipe.model.base, recipe.data.train, recipe.data.held_out


def are_here(*names: str | None) -> bool:
    """Whether bases and rows of these names are on this machine, so that nobody is to be asked for them."""
    return all(name is None or name == "demo" or Path(name).is_absolute() for name in names)


@contextmanager
def at_work(*names: str | None) -> Iterator[None]:
    """While the libraries work for us on what has these names: their messages are kept, and they ask no network for
    what is here."""
    from huggingface_hub import constants

    before, is_offline = os.environ.get(OFFLINE), constants.HF_HUB_OFFLINE
    with logs.as_guest():
        logs.quiet_libraries()
        if are_here(*names):
            os.environ[OFFLINE], constants.HF_HUB_OFFLINE = "1", True
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = is_offline
            if before is None:
                os.environ.pop(OFFLINE, None)
            else:
                os.environ[OFFLINE] = before
