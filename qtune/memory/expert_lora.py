"""LoRA on packed experts: peft's adapter of a 3-D parameter, without its sum of weight and update.

Held less of: peft adds the update of all experts to their weights, a second (E, N, K) in 16 bits; here each expert's
tokens go through its factors. The adapter's parameters, names and files are peft's own.
Costs: two narrow matrix products for each expert that is hit.
Refuses: dropout and DoRA, as peft does for parameters; more than one adapter at a time; merging into packed weights.

Letters: E experts, (N, K) the shape of one expert's matrix.
"""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper

from qtune.memory.mixture_of_experts import Factors
from qtune.memory.packed_experts import expert_modules, is_packed, stacked_names


def expert_targets(model: torch.nn.Module) -> list[str]:
    """What `LoraConfig(target_parameters=...)` calls the packed parameters of `model`: `mlp.experts.down_proj`."""
    parameters: dict[str, None] = {}
    owners = {id(experts) for experts in expert_modules(model)}
    for name, module in model.named_modules():
        if id(module) in owners:
            short = ".".join(part for part in name.split(".") if part != "base_layer").split(".")[-2:]
            held = [own for own in stacked_names(module) if is_packed(getattr(module, own, None))]
            parameters |= dict.fromkeys(".".join([*short, own]) for own in held)
    return list(parameters)


def register(config: LoraConfig, model: torch.nn.Module) -> None:
    """Have peft wrap the packed experts of `model` by the class below. Call before `config` meets `model`."""
    kinds = {type(e) for e in expert_modules(model) if any(is_packed(p) for p in e.parameters(recurse=False))}
    config._register_custom_module(dict.fromkeys(kinds, ParamWrapper))


class ParamWrapper(PeftParamWrapper):
    """The factors of one packed parameter, lent to the experts for a forward pass. peft looks for this class's name."""

    def _get_in_out_features(self, module: torch.nn.Module) -> tuple[int, int]:
        self.num_experts, rows, columns = self.get_param().quant_state.shape
        self._param_ndim = 3
        return rows, columns  # update_layer swaps them, as it does for every (E, N, K)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or not active:
            return self.base_layer(x, *args, **kwargs)
        assert len(active) == 1, "one adapter at a time"
        experts = self.get_base_layer()
        before = experts.__dict__.get("lent_factors", {})
        experts.lent_factors = {**before, self.parameter_name: self._factors(active[0])}
        try:
            return self.base_layer(x, *args, **kwargs)
        finally:
            experts.lent_factors = before

    def _factors(self, adapter: str) -> Factors:
        return Factors(self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.scaling[adapter])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError("An adapter cannot be merged into packed experts; merge it into the 16-bit base.")
