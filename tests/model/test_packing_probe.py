"""A document in a pack must be what it is alone; where it is not, no run trains on packs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BOS, END, PAD, byte_tokenizer
from made_models import on_cpu
from stopped_runs import qtune, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qtune.evaluate.held_out_loss import document_loss
from qtune.lock import PackingProbe
from qtune.memory import attention_kernels, fused_cross_entropy, packed_attention, packed_mixers
from qtune.model import packing_probe
from qtune.model.base import load_base
from qtune.recipe.schema import Model
from qtune.rundir import read_json

TOKENS = range(256)
SHAPE = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": BOS,
    "eos_token_id": END,
    "pad_token_id": PAD,
}
FEW_SEEN = {"keep_window_size": 8}  # Doge masks all but the eight tokens that its values say matter
CONVOLUTION = {"layer_types": ["conv", "full_attention"]}


def probe(model: PreTrainedModel) -> PackingProbe:
    return packing_probe.probe(on_cpu(model), TOKENS, lambda document: document_loss(on_cpu(model), document))


def config_of(kind: str, **changes: Any) -> Any:
    return AutoConfig.for_model(kind, **{**SHAPE, **changes})


def build(kind: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    packed_attention.register()
    model = AutoModelForCausalLM.from_config(
        config_of(kind, **changes), attn_implementation=packed_attention.NAME, dtype=torch.float32
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.15)  # transformers' 0.02 hides a leak behind the embedding
    packed_attention.install(model)
    packed_mixers.install(model)
    fused_cross_entropy.install(model)
    return model


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 8}),
        ("olmo3", {"sliding_window": 8}),
        ("lfm2", CONVOLUTION),
        ("nemotron", {}),
        ("stablelm", {}),
    ],
)
def test_a_base_whose_tokens_meet_in_attention_and_mixers_does_not_leak(kind: str, changes: dict[str, Any]) -> None:
    found = probe(build(kind, **changes))
    assert not found.leaks
    assert not found.is_another_model
    assert found.moved_in_pack < 1e-5
    assert found.by_loss < 1e-5


# A convolution runs on from one document to the next; Nemotron's code hands no keyword on to its attention, so the
# lengths of the documents never arrived. Both trained on leaking packs without a word.
def test_a_leak_is_found_whatever_it_leaks_through() -> None:
    model = build("llama")
    model.model.norm.register_forward_hook(lambda norm, inputs, hidden: hidden + hidden.cumsum(1) / 8)  # as code may do
    found = probe(model)
    assert found.leaks
    assert found.moved_in_pack > 0.1
    assert not found.is_another_model
    assert model.config._attn_implementation == packed_attention.NAME


def test_an_attention_that_does_more_than_ours_is_found_with_one_document() -> None:
    found = probe(build("doge", **FEW_SEEN))
    assert found.is_another_model
    assert found.by_attention > 0.1


def test_logits_that_are_no_numbers_are_no_proof() -> None:
    model = build("llama")
    torch.nn.init.constant_(model.get_output_embeddings().weight, float("nan"))
    found = probe(model)
    assert found.leaks
    assert found.is_another_model


# RecurrentGemma's cap of the logits was taken for no cap, and xLSTM's was not handed on: both were refused.
@pytest.mark.parametrize(("kind", "cap"), [("recurrent_gemma", "logits_soft_cap"), ("xlstm", "output_logit_soft_cap")])
def test_a_cap_of_the_logits_is_one_by_whatever_name(kind: str, cap: str) -> None:
    found = probe(build(kind, **{cap: 1.0}).requires_grad_(False))
    assert found.by_loss < 1e-5
    assert not found.is_another_model
    assert not found.leaks


def test_a_head_that_does_more_than_a_product_is_found_by_its_loss() -> None:
    model = build("llama")
    model.lm_head.register_forward_hook(
        lambda head, inputs, logits: logits / 3
    )  # as remote code may; no setting says it
    found = probe(model)
    assert found.is_another_loss
    assert not found.is_another_model
    assert not found.leaks


def saved(folder: Path, kind: str, **changes: Any) -> Path:
    model = build(kind, **changes)
    model.config._attn_implementation_internal = None
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MeanConfig(LlamaConfig):
    model_type = "running_mean"

class MeanForCausalLM(LlamaForCausalLM):
    config_class = MeanConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.norm.register_forward_hook(lambda norm, inputs, hidden: hidden + hidden.cumsum(1) / 8)
"""


def test_code_that_comes_with_a_base_is_probed_like_any_other(tmp_path: Path, tiny_base: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    (folder / "modeling_mean.py").write_text(REMOTE_CODE)
    code = {"AutoConfig": "modeling_mean.MeanConfig", "AutoModelForCausalLM": "modeling_mean.MeanForCausalLM"}
    described = json.loads((folder / "config.json").read_text())
    described |= {"model_type": "running_mean", "architectures": ["MeanForCausalLM"], "auto_map": code}
    (folder / "config.json").write_text(json.dumps(described))
    model = load_base(Model(base=str(folder), trust_remote_code=True), "cpu", "float32")
    found = probe(model)
    assert found.leaks
    assert not found.is_another_model


def test_a_leaking_base_is_trained_a_document_a_pass_and_the_run_says_so(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one is whose mixers nobody finds. So does it of attention that this card's torch gets wrong."""
    monkeypatch.setattr(packed_mixers, "install", lambda model: None)
    monkeypatch.setattr(attention_kernels, "varlen_faults", lambda: ["off by 30% of the largest value"])
    base = saved(tmp_path / "base", "lfm2", **CONVOLUTION)
    losses = {}
    for packing in (True, False):
        folder = tmp_path / f"packing-{packing}"
        folder.mkdir()
        recipe = write_recipe(
            folder,
            base,
            data={"packing": packing},
            model={"compute_dtype": "float32"},
            evaluate={"rows": 0},
            train={"max_steps": 2},
        )
        assert qtune("run", recipe, "--output", folder / "run") == 0
        losses[packing] = read_json(folder / "run" / "scores.json")["base"]["held_out_loss"]
    run = tmp_path / "packing-True" / "run"
    said = capsys.readouterr().out
    assert "documents in a pack read each other" in said
    assert "torch's varlen_attn does not work here (off by 30% of the largest value)" in said
    plan, lock = read_json(run / "plan.json"), read_json(run / "lock.json")
    assert plan["documents_apart"]
    (packing_choice,) = (choice for choice in plan["choices"] if choice["name"] == "packing")
    assert packing_choice["value"].startswith("no")
    assert "read each other" in packing_choice["reason"]
    assert lock["packing_probe"]["leaks"]
    assert losses[True] == pytest.approx(losses[False], abs=1e-6)
    capsys.readouterr()
    assert qtune("eval", run) == 0
    assert read_json(run / "eval-rows.json")["base"]["held_out_loss"] == pytest.approx(losses[True], abs=1e-6)
    assert qtune("resume", run, "--set", "train.max_steps=3", "--allow-change", "train.max_steps") == 0
    assert read_json(run / "lock.json")["packing_probe"]["leaks"]
    assert qtune("report", run) == 0
    assert "read each other" in capsys.readouterr().out


def test_a_base_that_is_another_under_packed_attention_is_refused(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Doge was before its own attention was left to it."""
    monkeypatch.setattr(packed_mixers, "UNKNOWN", ())
    base = saved(tmp_path / "base", "doge", **FEW_SEEN)
    recipe = write_recipe(tmp_path, base, evaluate={"rows": 0}, train={"max_steps": 1})
    assert qtune("run", recipe, "--output", tmp_path / "run") == 2
    assert "is another model under packed attention" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
