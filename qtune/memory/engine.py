"""The memory techniques of a live model: which it allows, and how it is brought to those that are wanted.

Every technique may be switched on in a model that is running, between two passes; none is switched off again.
"""

import torch
from peft import PeftModel

from qtune.distributed.ranks import ALONE, Ranks
from qtune.memory.fused_lora import fuse
from qtune.memory.gradient_checkpointing import LayerRunner, find_layers
from qtune.memory.techniques import TECHNIQUES, Techniques


def refusals(model: PeftModel) -> dict[str, str]:
    """Which techniques `model` does not allow, by their names, each with a sentence on why."""
    layers = find_layers(model)
    why_no_layers = f"the decoder layers of {type(model.get_base_model()).__name__} cannot be run one by one"
    whys = {
        name: why_no_layers if each.needs_layers and not layers else each.refusal(model, layers)
        for name, each in TECHNIQUES.items()
    }
    return {name: why for name, why in whys.items() if why is not None}


class Engine:
    """The techniques of one live model, and what of it they are switched on in (`memory.techniques.LiveModel`).

    `ranks` are those that hold the same model, and run passes at the same time.
    """

    def __init__(self, model: PeftModel, ranks: Ranks = ALONE):
        self.ranks = ranks
        self.model, self.causal = model, model.get_base_model()
        self.layers = find_layers(model)
        self.device = _device_of(model)
        self.is_tied = _is_tied(model)
        self.runner = LayerRunner(self.layers, keeps_random_state=_draws_random_numbers(model))
        self.techniques = Techniques()
        self.siblings = fuse(model)
        send_inputs_to_layers(self.causal)

    def switch_to(self, wanted: Techniques) -> None:
        """Bring the model to `wanted`. What is on stays on, also where `wanted` does without it."""
        target = wanted.on_top_of(self.techniques)
        for name, each in TECHNIQUES.items():
            if getattr(target, name) != getattr(self.techniques, name):
                each.switch_on(self, target)
        self.techniques = target

    def forget_pass(self) -> None:
        """Drop what a pass that did not come to its end has left behind."""
        self.runner.is_recomputing = False
        for siblings in self.siblings:
            siblings.forget()
        if self.runner.host is not None:
            self.runner.host.forget()


def send_inputs_to_layers(causal: torch.nn.Module) -> None:
    """Have `causal.device` be where its layers compute: there `generate` of transformers sends what a pass begins with.
    By itself it is where the first parameter is, which may be host memory."""
    kind = type(causal)
    if "device" not in vars(kind):  # of a model that had an engine before
        members = {"device": property(_device_of), "__module__": kind.__module__}
        causal.__class__ = type(kind.__name__, (kind,), members)


def _device_of(model: torch.nn.Module) -> torch.device:
    """Where the model computes: where its norms are, which no technique moves."""
    small = (parameter for parameter in model.parameters() if parameter.ndim < 2)
    return next(small, next(model.parameters())).device


def _is_tied(model: PeftModel) -> bool:
    """Whether one table is both embedding and output head."""
    causal = model.get_base_model()
    head = causal.get_output_embeddings()
    return head is not None and head.weight is causal.get_input_embeddings().weight


def _draws_random_numbers(model: PeftModel) -> bool:
    """Whether a training pass drops anything out, so that running it again needs the same random numbers.

    By a module, or by a rate in the config that is read where it is used.
    """
    dropped = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    settings = model.get_base_model().config.get_text_config().to_dict()
    rates = [value for name, value in settings.items() if "drop" in name or "jitter" in name]
    return dropped or any(isinstance(rate, float) and rate > 0 for rate in rates)
