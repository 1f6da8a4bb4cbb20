"""What `import qtune` offers, beside the making of recipes: data checked, runs planned, trained and opened again."""

import dataclasses
import json
import queue
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qtune.errors import MachineError, UserError
from qtune.events import Event, Listener
from qtune.fast_imports import quick_imports
from qtune.guest import at_work, sources
from qtune.recipe import load, shipped_recipes
from qtune.recipe.schema import Recipe
from qtune.rundir import RunDir, read_json, refuse_used
from qtune.train import trackers

if TYPE_CHECKING:
    from pandas import DataFrame

    from qtune.audit.thresholds import Checked
    from qtune.gguf.contents import Target
    from qtune.gguf.export import ExportReport
    from qtune.gguf.writer import Quant
    from qtune.merge.merged_weights import DType, Onto
    from qtune.merge.verify import MergeVerdict
    from qtune.plan.plan import Plan
    from qtune.report.progress_line import Doing
    from qtune.report.run_list import State
    from qtune.report.run_record import Record


SECONDS_BETWEEN_LOOKS = 0.1  # at whether a training that nobody listens to any more has ended


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | None = None, demo: bool = False) -> Recipe:
    """The recipe file `name`, or the shipped recipe of that name such as "medical".

    `overrides` are settings by their full names, such as `{"train.epochs": 2}`; `demo` uses what its [demo] says.
    Raises RecipeError with every fault that is found.
    """
    return load.load(shipped_recipes.find(str(name)), _as_texts(overrides), demo)


def _as_texts(overrides: Mapping[str, Any] | None) -> list[str]:
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in (overrides or {}).items()]


def check_data(recipe: Recipe, doing: "Doing | None" = None) -> "Checked":
    """Everything that is wrong with the rows, by file and line: its `outcome`, and each of its `findings`.

    Raises a UserError for rows that cannot be looked at.
    """
    with quick_imports():
        from qtune.audit.audit import audit
        from qtune.audit.run_refusals import refusals
        from qtune.audit.thresholds import judge
        from qtune.evaluate.held_out import fault_asked, general_packs
        from qtune.model.tokenizer import load_tokenizer
        from qtune.recipe.paths import GENERAL_WORDS
        from qtune.report.progress_line import Doing

    doing = doing or Doing()
    with at_work(*sources(recipe)):
        doing(f"reading {recipe.model.base}")
        tokenizer = load_tokenizer(recipe.model)
        if recipe.evaluate.general not in GENERAL_WORDS:
            general_packs(recipe.evaluate.general, tokenizer, recipe.data.max_tokens)  # a run refuses one without text
        doing(f"reading {recipe.data.title}")
        asked, in_pairs = fault_asked(recipe.evaluate), recipe.train.learns_pairs
        found = audit(recipe.data, tokenizer, doing.rows, asked, in_pairs)
        return judge(found, recipe.data, refusals(found, recipe, tokenizer))


def make_plan(
    recipe: Recipe,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    doing: "Doing | None" = None,
) -> "Plan":
    """How the run would fit, and what it costs, on this machine or on a card with `device_memory` ("8GiB", "RTX 4090",
    or bytes) in a host with `host_memory`; nothing but a config.json, and an adapter to start from, is downloaded.
    `plan.fits` says whether it does.

    Raises a UserError for anything that could not be trained on.
    """
    from qtune.gpu_models import GpuModel, memory_of, model_of

    try:
        asked = model_of(device_memory) if isinstance(device_memory, str) else device_memory
        host = memory_of(host_memory) if isinstance(host_memory, str) else host_memory
    except ValueError as fault:
        raise UserError(f"{fault}.") from None
    with quick_imports():
        from qtune import hardware
        from qtune.planning import plan_without_downloads
        from qtune.report.progress_line import Doing

    with at_work(*sources(recipe)):
        here = hardware.find_device()
        card = GpuModel(asked) if isinstance(asked, int) else asked
        target = hardware.imagined_card(card, host, here) if card else hardware.with_host(here, host)
        return plan_without_downloads(recipe, target, doing or Doing())


def finetune(recipe: Recipe, output: str | Path | None = None, on_event: Listener | None = None) -> "Run":
    """Train a recipe as `qtune run` does: check, score, train, score again. All of it is in the run's folder, `output`
    or runs/NAME-DATE-TIME, when this returns.

    `on_event` hears everything that happens, each a value of `qtune.events`; without it that is printed, a line each.
    On the main thread Ctrl-C, or the interruption of a notebook's kernel, ends training after the step under way: the
    run comes back as a stopped one, with its adapter and a checkpoint. Raises a UserError for anything that cannot be
    trained on, DoesNotFit, TrainingDiverged, OutOfMemory and DiskFull.
    """
    return _train(recipe, output, on_event, catches_signals=_is_on_main_thread())


def _is_on_main_thread() -> bool:
    """Where Python delivers signals."""
    return threading.current_thread() is threading.main_thread()


def _train(
    recipe: Recipe,
    output: str | Path | None,
    on_event: Listener | None,
    stop: threading.Event | None = None,
    catches_signals: bool = False,
) -> "Run":
    recipe = load.bare(recipe)
    if output is not None:
        refuse_used(Path(output))
    trackers.make_ready(recipe.report.to)
    with quick_imports():
        from qtune import run as story
        from qtune.ready import get_ready, start_folder
        from qtune.resume import Invocation

    with at_work(*sources(recipe)):
        ready = get_ready(recipe)
        began = Invocation(str(Path.cwd()), (), False)
        folder = start_folder(ready, load.as_toml(recipe), began, None if output is None else Path(output))
        with folder.held():
            story.get_weights(ready, folder, _say_nothing)
            listen = on_event or _printed(ready.plan.steps)
            story.run(ready, folder, listen, stop=stop, catches_signals=catches_signals)
    return Run(folder)


def _printed(steps: int) -> Listener:
    from qtune.report.log_lines import PlainLines

    return PlainLines(sys.stdout, steps)


def _say_nothing(text: str) -> None:
    """What only a person at a terminal is told."""


class Training:
    """The same as it goes: `for event in Training(recipe): ...` hears all that happens, and training waits while the
    loop's body is at work. It is done by a thread.

    To leave the loop, `stop()`, and Ctrl-C on the main thread, end training after the step under way; its adapter and a
    checkpoint are kept. What `finetune` raises comes out of the loop.
    """

    def __init__(self, recipe: Recipe, output: str | Path | None = None):
        self._recipe, self._output = recipe, output
        self._stop = threading.Event()
        self._run: Run | None = None
        self._fault: BaseException | None = None

    @property
    def run(self) -> "Run":
        """The run that came of it. Raises UserError before the loop has ended."""
        if self._run is None:
            raise UserError("Training.run: there is none before `for event in training` has come to its end.")
        return self._run

    def stop(self) -> None:
        """Have training end after the step under way."""
        self._stop.set()

    def __iter__(self) -> Iterator[Event]:
        heard: queue.Queue[Event | None] = queue.Queue(maxsize=1)
        worker = threading.Thread(target=self._work, args=(heard,), name="training", daemon=True)
        worker.start()
        try:
            with self._stopped_by_interruption():
                while (event := heard.get()) is not None:
                    yield event
        finally:
            self._stop.set()
            while worker.is_alive():
                with suppress(queue.Empty):
                    heard.get(timeout=SECONDS_BETWEEN_LOOKS)
        if self._fault is not None:
            raise self._fault

    def _work(self, heard: "queue.Queue[Event | None]") -> None:
        try:
            self._run = _train(self._recipe, self._output, heard.put, self._stop)
        except BaseException as fault:  # it is the loop's
            self._fault = fault
        heard.put(None)

    @contextmanager
    def _stopped_by_interruption(self) -> Iterator[None]:
        """The first Ctrl-C stops training, a second leaves the loop at once."""
        if not _is_on_main_thread():
            yield
            return

        def interrupted(number: int, frame: Any) -> None:
            if self._stop.is_set():
                raise KeyboardInterrupt
            self._stop.set()

        before = signal.signal(signal.SIGINT, interrupted)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def open_run(path: str | Path, base: str | Path | None = None) -> "Run":
    """A run by its folder, be it finished or not; `base` is where its base is now, if it was moved.

    Raises RunFolderError for what is no run.
    """
    return Run(RunDir.open_to_resume(Path(path)) if base is None else RunDir.open(Path(path), Path(base)))


def show(value: "Run | Plan | Checked") -> None:
    """Print a run, a plan or a check of data as the command line does; in Jupyter, as it shows such things."""
    with quick_imports():
        from rich.console import Console

        from qtune.plan.plan import Plan
        from qtune.report import plan_table, summary
        from qtune.report.audit_table import audit_table

    console = Console()
    if isinstance(value, Run):
        console.print(summary.report(value.folder))
    else:
        console.print(plan_table.whole_plan(value.as_json()) if isinstance(value, Plan) else audit_table(value, False))


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
    def done_early(self) -> str | None:
        """How `train.patience` ended training before its last step: `done at step 7 of 15, with no better held-out loss
        in 3`; None where it did not."""
        return self._record.done_early

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
    def watched(self) -> dict[str, dict[int, str]]:
        """By prompt of `evaluate.watch`, what was answered to it after how many steps."""
        return self._record.watched

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

    def resume(
        self,
        overrides: Mapping[str, Any] | None = None,
        allow_change: Sequence[str] = (),
        on_event: Listener | None = None,
    ) -> "Run":
        """Go on with a run that was stopped, exactly where it was, as `qtune resume` and `finetune` do.

        Raises RunFolderError where it no longer is what it was and that is not allowed, field by field.
        """
        with quick_imports():
            from qtune import resume
            from qtune import run as story
            from qtune.ready import folder_again, get_ready_again
            from qtune.report.progress_line import Doing

        resume.refuse_without_checkpoints(self.folder)
        with self.folder.held():
            recipe = resume.recipe_of(self.folder, _as_texts(overrides))
            trackers.make_ready(recipe.report.to)
            with at_work(*sources(recipe)):
                ready, going_on = get_ready_again(self.folder, recipe, allow_change, Doing())
                resume.remember(self.folder, _as_texts(overrides))
                folder_again(ready, self.folder)
                listen, is_main = on_event or _printed(ready.plan.steps), _is_on_main_thread()
                story.run(ready, self.folder, listen, going_on, catches_signals=is_main)
        return Run(self.folder)

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
