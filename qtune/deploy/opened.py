"""A run opened to answer: its base as it was trained on, with the adapter on it."""

from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qtune.memory.device import find_device
from qtune.memory.techniques import Engine, Techniques
from qtune.model import adapter, base
from qtune.model.identity import refuse_other_base
from qtune.model.tokenizer import load_tokenizer
from qtune.recipe.schema import Model
from qtune.rundir import RunDir


def model_of(run: RunDir) -> Model:
    """The base as the run's recipe has it, or where it is now.

    Raises RunFolderError for settings of another version of qtune.
    """
    return run.read_as(run.lock, lambda lock: Model(**lock["model"]))


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
