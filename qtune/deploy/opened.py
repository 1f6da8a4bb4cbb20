"""A run opened to answer: its base as it was trained on, with the adapter on it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qtune.errors import ModelError
from qtune.memory.device import find_device
from qtune.memory.techniques import Engine, Techniques
from qtune.model import adapter, base, identity
from qtune.model.tokenizer import load_tokenizer
from qtune.recipe.schema import Model
from qtune.rundir import RunDir


def model_of(run: RunDir) -> Model:
    """The base as the run's recipe has it, or where it is now.

    Raises RunFolderError for settings of another version of qtune.
    """
    return run.read_as(run.lock, lambda lock: Model(**lock["model"]))


def refuse_other_base(run: RunDir, folder: Path) -> None:
    """Raises ModelError where, at a glance, the weights in `folder` are others than those the run was trained on."""
    then = run.read_lock()["base"]
    expected = then.get("glance_sha256")  # older locks have none
    if expected is not None and identity.glance(folder) != expected:
        raise ModelError(
            f"{folder}: is not the base of {run.path}; its weights are others than the run was trained on. Put back the"
            f" base the run names ({then['name']})."
        )


@dataclass(frozen=True)
class Opened:
    """A tuned model in eval mode, which is the base where its adapter is disabled; `lock` is the run's."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    device: str
    compute_dtype: str
    lock: dict[str, Any]

    @classmethod
    def of(cls, run: RunDir) -> "Opened":
        """Raises ModelError and MachineError for a base or an adapter that is missing, is another, or does not fit."""
        base.quiet_libraries()
        lock, spec = run.read_lock(), model_of(run)
        device, dtype = find_device().name, lock["compute_dtype"]
        techniques = run.read_as(run.plan, Techniques.for_answers)
        refuse_other_base(run, base.base_folder(spec))
        loaded = base.load_base(spec, device, dtype, techniques)
        tuned = adapter.load(loaded, run.adapter).eval()
        Engine(tuned).switch_to(techniques)
        return cls(tuned, load_tokenizer(spec), device, dtype, lock)
