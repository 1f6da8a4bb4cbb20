"""Refusals for which the command line, a run's own JSON and a look at the disk are enough.

They are made before a verb imports, reads or plans anything, which takes from seconds to minutes.
"""

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from qtune.errors import MachineError, ModelError, RunFolderError, UserError, how_to_install
from qtune.model import fingerprint
from qtune.recipe import base_kind
from qtune.recipe.base_kind import GGUF_SUFFIX
from qtune.rundir import RUNS, RunDir, default_export, is_run, refuse_unmakeable, refuse_used


def refuse(options: argparse.Namespace) -> None:
    """Raises UserError for options of a verb that cannot be."""
    for check in CHECKS.get(options.verb, ()):
        check(options)


def refuse_unusable(run: RunDir) -> None:
    """Raises UserError for a run without an adapter, or whose base is not where it was, or is another."""
    lock = run.read_lock()
    if not (run.adapter / base_kind.ADAPTER_CONFIG).is_file():
        raise RunFolderError(f"{run.path}: has no adapter yet. Go on with it: qtune resume {run.path}")
    folder = Path(lock.base_name)
    if not folder.is_absolute():
        return
    if not folder.exists():
        raise ModelError(
            f"{run.path}: its base is not in {folder} any more. If it was moved, say where it is with --base FOLDER."
        )
    if fault := base_kind.fault_of(folder, trust_remote_code=lock.trusts_remote_code):
        raise ModelError(f"{'--base' if run.base else f'{run.path}: its base'}: {fault}")
    fingerprint.refuse_other_base(run, folder)


def _output(options: argparse.Namespace) -> None:
    refuse_unmakeable(RUNS / "new") if options.output is None else refuse_used(options.output)


def _given_output(options: argparse.Namespace) -> None:
    if options.output is not None:
        refuse_used(options.output)


def _benchmarks(options: argparse.Namespace) -> None:
    if options.tasks and find_spec("lm_eval") is None:
        raise MachineError(f"--tasks: needs lm-eval, which is not installed: {how_to_install('eval')}")
    if options.task_folder is not None and not options.task_folder.is_dir():
        raise UserError(f"--task-folder: there is no folder {options.task_folder}.")


def _merged(options: argparse.Namespace) -> None:
    for path in options.merged:
        if not path.exists():
            raise UserError(f"--merged {path}: there is no such folder or file.")
        if path.suffix == GGUF_SUFFIX:
            _refuse_without_llama_cpp(path)
        elif fault := base_kind.fault_of(path, trust_remote_code=True):
            raise UserError(f"--merged {path}: {fault}")


def model_at(path: Path) -> Path | None:
    """The merged folder or the GGUF file that a chat is to be held with: an export's folder stands for the one file in
    it. None for a run folder, and for what is none of them."""
    if path.suffix == GGUF_SUFFIX and path.is_file():
        return path
    if not path.is_dir() or is_run(path):
        return None
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return path
    files = list(path.glob(f"*{GGUF_SUFFIX}"))
    return files[0] if len(files) == 1 else None


def _chat(options: argparse.Namespace) -> None:
    for name in ("top_p", "seed"):
        if getattr(options, name) is not None and not options.temperature:
            raise UserError(f"--{name.replace('_', '-')}: has no effect without --temperature. Give it, such as 0.7.")
    model = model_at(options.run)
    if model is None:
        return
    for name in ("compare", "base"):
        if getattr(options, name):
            raise UserError(f"--{name}: {model} holds one model, and no base beside it. Give the run folder.")
    if model.suffix == GGUF_SUFFIX:
        _refuse_without_llama_cpp(model)


def _idle_of_eval(options: argparse.Namespace) -> None:
    """Raises UserError for an option that has no effect, or cannot be, beside or without --tasks."""
    idle = ("rows", "samples", "metric", "data") if options.tasks else ("task_folder", "limit")
    for name in idle:
        if getattr(options, name) is not None:
            beside = "beside" if options.tasks else "without"
            raise UserError(f"--{name.replace('_', '-')}: has no effect {beside} --tasks. Leave it out.")
    gguf = [path for path in options.merged if options.tasks and path.suffix == GGUF_SUFFIX]
    if gguf:
        raise UserError(
            f"--merged {gguf[0]}: lm-eval is run on models that transformers loads, not on GGUF files. Leave it out, or"
            " leave out --tasks to score it on the held-out rows."
        )
    if options.tasks == []:
        raise UserError("--tasks: names no task. Give one, such as arc_easy.")


def _own_rows(options: argparse.Namespace) -> None:
    if options.data is not None and not options.data.is_file():
        raise UserError(f"--data {options.data}: there is no such file.")


def _refuse_without_llama_cpp(path: Path) -> None:
    if find_spec("llama_cpp") is None:
        raise MachineError(f"{path}: needs llama-cpp-python, which is not installed: {how_to_install('verify')}")


def _picture(options: argparse.Namespace) -> None:
    if options.action == "check" and options.plot is not None:
        from qtune.report import length_histogram

        length_histogram.picture_path(options.plot)


def _going_on(options: argparse.Namespace) -> None:
    """Without its checkpoints a run would begin again, over the adapter that it has."""
    if RunDir(options.run).checkpoints_removed.is_file():
        raise RunFolderError(
            f"{options.run}: its checkpoints were removed, so it cannot go on. `qtune run` begins a new run."
        )


def _exported(options: argparse.Namespace) -> None:
    refuse_used(options.output or default_export(options.run, options.to, options.quant))


def _moved_base(options: argparse.Namespace) -> None:
    if options.base is not None and options.run is None:
        raise UserError("--base: has no effect without --run. Give both.")


CHECKS: dict[str, tuple[Callable[[argparse.Namespace], None], ...]] = {
    "run": (_output,),
    "merge": (_given_output,),
    "resume": (_going_on,),
    "export": (_exported,),
    "chat": (_chat,),
    "eval": (_idle_of_eval, _own_rows, _benchmarks, _merged),
    "data": (_picture,),
    "doctor": (_moved_base,),
}
