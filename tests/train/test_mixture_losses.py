"""Ten steps of a mixture of experts, beside a loop over single documents in float64."""

from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer
from made_models import SHAPE
from peft import PeftModel
from test_loop import recipe_for, rows, session_of
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qtune.events import StepDone
from qtune.model import adapter

KINDS = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 2.0},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
}
STEPS, RATE = 10, 3e-3
TRAIN = {
    "learning_rate": RATE,
    "schedule": "constant",
    "warmup_fraction": 0.0,
    "optimizer": "adamw",
    "weight_decay": 0.01,
}


QUICK = "granitemoe"  # others of single passes: memory/test_loss_parity.py, memory/test_mixture_of_experts.py


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.long] * (kind != QUICK)) for kind in KINDS])
def test_ten_losses_are_those_of_single_documents_in_float64(kind, tmp_path) -> None:
    """trl added the routers' balance over a pack to the loss of those whose head scales its logits."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**SHAPE, "num_hidden_layers": 2, **KINDS[kind], "router_aux_loss_coef": 0.1})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    recipe = recipe_for(tmp_path / "base", {"quantization": "none", "compute_dtype": "float32"}, **TRAIN)
    session, events = session_of(recipe)
    start = {n: p.detach().clone() for n, p in session.learner.loaded.model.named_parameters() if p.requires_grad}
    session.run()
    ours = [event.loss for event in events if isinstance(event, StepDone)]
    assert ours == pytest.approx(by_hand(tmp_path / "base", recipe, start, session), rel=1e-6)


def by_hand(folder: Path, recipe, start: dict[str, torch.Tensor], session) -> list[float]:
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    base.requires_grad_(False)
    model = adapter.attach(base, recipe.lora, 0).double()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert named.keys() == start.keys()
    for name, parameter in named.items():
        parameter.data = start[name].double()
    optimizer = torch.optim.AdamW(named.values(), lr=RATE, weight_decay=recipe.train.weight_decay, eps=1e-8)
    packs, losses = rows(20), []
    order = session.rows.order(recipe.train.seed)
    for step in range(1, STEPS + 1):
        chosen = [packs[number] for number in order.of_step(step, 1, recipe.train.gradient_accumulation)]
        nats = sum(sum(nats_of(model, *document) for document in documents(pack)) for pack in chosen)
        loss = nats / sum(label != -100 for pack in chosen for label in pack["labels"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), recipe.train.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def documents(pack):
    start = 0
    for length in pack["seq_lengths"]:
        yield pack["input_ids"][start : start + length], pack["labels"][start : start + length]
        start += length


def nats_of(model: PeftModel, ids: list[int], labels: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum")
