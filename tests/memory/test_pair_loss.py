"""The loss of pairs: beside trl's own trainers, beside float64, in pieces, and of the base."""

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, tiny_config
from datasets import Dataset
from made_models import adapted, base, batch, switched, trained
from peft import LoraConfig, PeftModel
from torch.nn.functional import logsigmoid
from transformers import LlamaForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from qtune.data.packing import PackedRow, collate
from qtune.data.rows import NOT_TRAINED
from qtune.evaluate.held_out_loss import with_fused_head
from qtune.memory import fused_cross_entropy, fused_layers, packed_attention, pair_loss
from qtune.memory.split_batch import split_batch
from qtune.memory.techniques import Techniques
from qtune.train.objectives import OBJECTIVES, Pairs

BETA = 0.3
ROWS = [
    {"prompt": "What is -olol?", "chosen": " A beta blocker, as far as I know.", "rejected": " No idea."},
    {"prompt": "And -pril?", "chosen": " An ACE inhibitor.", "rejected": " A kind of April, it may be said."},
    {"prompt": "-statin", "chosen": " lowers lipids", "rejected": " stands still"},
]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
OF_EACH = ["dpo", "orpo"]


def trls(objective: str, folder: Path) -> Any:
    """trl's own trainer with a tiny Llama, of which the adapter is not as it begins."""
    torch.manual_seed(0)
    settings = {"output_dir": str(folder), "beta": BETA, "use_cpu": True, "bf16": False, "report_to": []}
    settings |= {"per_device_train_batch_size": len(ROWS), "gradient_checkpointing": False}
    kind, config = (DPOTrainer, DPOConfig) if objective == "dpo" else (ORPOTrainer, ORPOConfig)
    if objective == "dpo":
        settings["max_length"] = None
    trainer = kind(
        model=LlamaForCausalLM(tiny_config()),
        args=config(**settings),
        processing_class=byte_tokenizer(),
        train_dataset=Dataset.from_list(ROWS),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
    )
    for weight in trained(trainer.model):
        torch.nn.init.normal_(weight, std=0.1)
    return trainer


def packed(objective: str, row: dict[str, Any]) -> PackedRow:
    """What trl made of a row, as two documents of a pack."""
    documents = []
    for name in ("chosen", "rejected"):
        if objective == "dpo":
            prompt, answer = row["prompt_ids"], row[f"{name}_ids"]
            documents.append((prompt + answer, [NOT_TRAINED] * len(prompt) + answer))
        else:
            documents.append((row[f"{name}_input_ids"], row[f"{name}_labels"]))
    ids, labels = ([token for document in documents for token in document[i]] for i in range(2))
    return PackedRow(input_ids=ids, labels=labels, seq_lengths=[len(document[0]) for document in documents])


def with_weights_of(theirs: PeftModel) -> PeftModel:
    """Ours of the same weights, with what qtune puts into a model."""
    packed_attention.register()
    model = LlamaForCausalLM(tiny_config(attn_implementation=packed_attention.NAME))
    model.requires_grad_(False)
    for install in (packed_attention.install, fused_layers.install, fused_cross_entropy.install):
        install(model)
    ours = adapted(model, **LORA)
    ours.load_state_dict(theirs.state_dict())
    switched(ours, Techniques())
    return ours


def loss_of(model: PeftModel, objective: str, rows: dict[str, Any], pieces: int = 1) -> torch.Tensor:
    """Its gradient added to what is there."""
    kind = OBJECTIVES[objective]
    totals = torch.tensor(pair_loss.totals_of([rows]))
    total = torch.zeros(())
    for piece in split_batch(rows, pieces, kind.documents):
        pairs = pair_loss.pairs_of(model, pair_loss.laid_out(piece, kind), kind, model.disable_adapter)
        loss = pair_loss.loss_of(pairs, kind, BETA, totals)
        loss.backward()
        total += loss.detach()
    return total


@pytest.mark.parametrize("objective", OF_EACH)
def test_loss_and_gradient_are_those_of_trls_trainer(objective: str, tmp_path: Path) -> None:
    trainer = trls(objective, tmp_path)
    rows = [trainer.train_dataset[i] for i in range(len(ROWS))]
    ours = with_weights_of(trainer.model)
    trainer.model.train()
    expected = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))
    expected.backward()

    found = loss_of(ours.train(), objective, collate([packed(objective, row) for row in rows]))

    assert abs(found.item() - expected.item()) < 1e-5
    theirs = dict(trainer.model.named_parameters())
    gradients = {name: weight.grad for name, weight in ours.named_parameters() if weight.grad is not None}
    assert len(gradients) == 2 * 2 * len(LORA["target_modules"])
    for name, gradient in gradients.items():
        assert (gradient - theirs[name].grad).norm() < 1e-5 * theirs[name].grad.norm(), name


@pytest.fixture(scope="module")
def model() -> PeftModel:
    made = adapted(base("llama"))
    switched(made, Techniques())
    return made


LENGTHS = (23, 9, 12, 30, 17, 16)  # three pairs


@pytest.mark.parametrize("objective", OF_EACH)
def test_loss_is_that_of_whole_answers_in_float64(model: PeftModel, objective: str) -> None:
    """Written out, of a document at a time, from logits that are held."""
    rows = batch(LENGTHS)
    sums = []
    model.eval()
    for of_base in (False, True):
        for document in split_batch(rows, len(LENGTHS)):
            ids, labels = document["input_ids"], document["labels"][0, 1:]
            with torch.no_grad(), model.disable_adapter() if of_base else contextlib.nullcontext():
                logs = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(1)
            own = logs.gather(1, ids[0, 1:, None])[:, 0]
            sums.append((own[labels != NOT_TRAINED].sum(), (labels != NOT_TRAINED).sum(), own.sum(), len(own)))
    of_answers, tokens, of_all, all_tokens = (
        torch.tensor(each, dtype=torch.double) for each in zip(*sums, strict=True)
    )
    chosen, rejected = of_answers[:6:2], of_answers[1:6:2]
    if objective == "dpo":
        expected = -logsigmoid(BETA * (chosen - rejected - (of_answers[6::2] - of_answers[7::2]))).mean()
    else:
        better, worse = chosen / tokens[:6:2], rejected / tokens[1:6:2]
        odds = (better.exp() / (1 - better.exp())).log() - (worse.exp() / (1 - worse.exp())).log()
        expected = -of_all[:6:2].sum() / all_tokens[:6:2].sum() - BETA * logsigmoid(odds).mean()
    found = loss_of(model.train(), objective, rows)
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("objective", OF_EACH)
def test_pieces_add_up_and_keep_pairs_together(model: PeftModel, objective: str) -> None:
    found = []
    for pieces in (1, 2, 3, 99):
        model.train().zero_grad()
        loss = loss_of(model, objective, batch(LENGTHS), pieces)
        found.append([loss, *(weight.grad.clone() for weight in trained(model))])
    for others in found[1:]:
        for ours, theirs in zip(others, found[0], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_an_adapter_that_does_nothing_yet_prefers_nothing() -> None:
    """Of the base and of the model that is the base the same numbers are made, so the first loss is log 2."""
    untrained = adapted(base("llama"))
    switched(untrained, Techniques())
    for name, weight in untrained.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.zeros_(weight)
    assert loss_of(untrained.train(), "dpo", batch(LENGTHS)).item() == pytest.approx(math.log(2), abs=1e-5)


def test_the_bases_pass_leaves_the_model_as_it_was() -> None:
    model = adapted(base("llama"), lora_dropout=0.5)
    switched(model, Techniques())
    kind, before = OBJECTIVES["dpo"], [weight.requires_grad for weight in model.parameters()]
    rows = pair_loss.laid_out(batch(LENGTHS), kind)
    model.train()
    first, second = (pair_loss.pairs_of(model, rows, kind, model.disable_adapter) for _ in range(2))
    assert torch.equal(first.base_chosen, second.base_chosen)
    assert not torch.equal(first.chosen, second.chosen)  # dropout
    assert not first.base_chosen.requires_grad
    assert first.chosen.requires_grad
    assert [weight.requires_grad for weight in model.parameters()] == before
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("objective", OF_EACH)
def test_a_head_that_ours_does_not_suit_gives_the_same(model: PeftModel, objective: str) -> None:
    model.train().zero_grad()
    expected = loss_of(model, objective, batch(LENGTHS))
    gradient = trained(model)[0].grad.clone()
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_cross_entropy, "suits", lambda model: False)
        with_fused_head(model)
        found = loss_of(model, objective, batch(LENGTHS))
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(trained(model)[0].grad, gradient, atol=1e-6, rtol=1e-4)
    model.zero_grad()


def test_orpo_stays_finite_where_an_answer_is_certain() -> None:
    logs = torch.zeros(1, requires_grad=True)
    pairs = Pairs(logs, torch.full((1,), -9.0), torch.ones(1), torch.ones(1), logs)
    loss = sum(OBJECTIVES["orpo"].of_pairs(pairs, BETA))
    loss.backward()
    assert loss.isfinite()
    assert logs.grad.isfinite()
