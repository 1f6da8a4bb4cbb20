"""A model opened to answer: a run's base as it was trained on with the adapter on it, or a merged folder."""

from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel

from qtune.hardware import find_device, host_memory, prepare
from qtune.lock import Lock
from qtune.memory.engine import Engine
from qtune.memory.nf4 import weight_rows
from qtune.memory.techniques import Techniques
from qtune.model import adapter, base
from qtune.model.fingerprint import refuse_other_base
from qtune.model.loaded import Loaded
from qtune.model.tokenizer import load_tokenizer
from qtune.recipe import chat_templates
from qtune.recipe.schema import Model
from qtune.rundir import RunDir


def model_of(run: RunDir) -> Model:
    """The base as the run's recipe has it, or where it is now, with the chat template that the run was trained with:
    the recipe's file may say something else by now.

    Raises RunFolderError for settings of another version of qtune.
    """
    model, kept = run.of_lock(lambda lock: Model(**lock.model)), run.adapter / chat_templates.FILE
    return model.model_copy(update={"chat_template": str(kept)}) if kept.is_file() else model


def techniques_of(run: RunDir) -> Techniques:
    """Where the weights were in training, and have to be where the same device is to answer.

    Raises RunFolderError where the run's plan is missing or is of no version that is known.
    """
    return run.read_as(run.plan, Techniques.for_answers)


def open_run(run: RunDir, is_for_talk: bool = False) -> Loaded:
    """A tuned model in eval mode, which is the base where its adapter is disabled.

    With `is_for_talk`, ready to make one answer after another, and not to be merged. Raises ModelError and MachineError
    for a base or an adapter that is missing, is another, or does not fit.
    """
    base.quiet_libraries()
    spec, device, dtype = model_of(run), prepare(find_device()).name, run.read_lock().compute_dtype
    techniques = techniques_of(run)
    refuse_other_base(run, base.base_folder(spec))
    loaded = base.load_base(spec, device, dtype, techniques)
    tuned = adapter.load(loaded, run.adapter).eval()
    if is_for_talk and device == "cpu" and not (techniques.streamed_layers or techniques.sharded_layers):
        _unpack(tuned, getattr(torch, dtype))
    Engine(tuned).switch_to(techniques)
    return Loaded(tuned, load_tokenizer(spec), device, dtype)


def open_merged(folder: Path, lock: Lock | None = None) -> Loaded:
    """A merged model, loaded as a base is and never quantised: as the run of `lock` computed; without one, as suits
    this device.

    Raises ModelError for a folder that holds no model, MachineError for one that is too large for the device.
    """
    base.quiet_libraries()
    trusted = lock is not None and lock.trusts_remote_code
    spec = Model(base=str(folder.resolve()), quantization="none", trust_remote_code=trusted)
    device = prepare(find_device())
    dtype = lock.compute_dtype if lock else device.compute_dtype
    tokenizer = load_tokenizer(spec)
    return Loaded(base.load_base(spec, device.name, dtype).eval(), tokenizer, device.name, dtype)


def _unpack(model: PeftModel, dtype: torch.dtype) -> None:
    """Put the weights that every token would dequantise anew in their place, where RAM has room for twice as much.

    The values are the same, and so are the answers; on a processor a token takes two thirds of the time.
    """
    packed = [
        (parent, name, module)
        for parent in model.modules()
        for name, module in parent.named_children()
        if isinstance(module, Linear4bit)
    ]
    needed = sum(module.in_features * module.out_features * dtype.itemsize for *_, module in packed)
    if 2 * needed <= host_memory()[1]:
        for parent, name, module in packed:
            setattr(parent, name, _unpacked(module, dtype))


def _unpacked(module: Linear4bit, dtype: torch.dtype) -> torch.nn.Linear:
    plain = torch.nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    plain.weight = torch.nn.Parameter(weight_rows(module, slice(0, module.out_features), dtype), requires_grad=False)
    plain.bias = module.bias
    return plain
