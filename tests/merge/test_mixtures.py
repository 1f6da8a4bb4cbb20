"""Mixtures of experts: an adapter on one is folded into what the checkpoint has, by the checkpoint's own names."""

from pathlib import Path

import pytest
import torch
from conftest import BOS, END, PAD, byte_tokenizer
from crossed import crossed
from made_models import SHAPE
from made_runs import edit_json, kept_run, token_rows
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BambaConfig, BambaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qtune.merge.checkpoint_names import Place
from qtune.merge.greedy_answers import ANSWER_TOKENS, continued
from qtune.merge.logit_distance import divergences
from qtune.merge.merge import merge
from qtune.merge.verify import Live, verify
from qtune.model import adapter
from qtune.recipe.schema import Lora, Model

MORE = {"num_hidden_layers": 2, "bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD}
FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1}
# How a checkpoint's experts become the model's: one by one with gate and up apart, by other names, as they are.
KINDS = {
    "qwen3_moe": FEW,
    "qwen2_moe": {**FEW, "shared_expert_intermediate_size": 64},
    "mixtral": {"num_local_experts": 4},
    "aria_text": {"moe_num_experts": 4, "moe_intermediate_size": 64},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
        "layer_types": ["full_attention"] * 2,
    },
    "dots1": {**ROUTED, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
}
EXPERTS = ("q_proj", "v_proj", "experts")


@pytest.fixture(scope="module", params=KINDS)
def base_folder(request, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[request.param](**{**SHAPE, **MORE, **KINDS[request.param]})
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def run_of(folder: Path, path: Path, targets: str | tuple[str, ...], **model: str):
    lora = Lora(rank=4, targets=targets)
    return kept_run(
        path,
        Model(base=str(folder), **model),
        lambda base: adapter.attach(base, lora, 0),
        "float32",
        stop_token_ids=(END,),
    )


@pytest.mark.parametrize(
    ("base_folder", "targets", "onto"),
    crossed([*KINDS], [("all-linear", "dequantised"), (EXPERTS, "dequantised"), (EXPERTS, "original")]),
    indirect=["base_folder"],
)
def test_a_merged_mixture_is_the_trained_one(base_folder, tmp_path, targets, onto) -> None:
    """The lock said nothing of experts, which were folded into as they are before 4 bits: a KL of 0.005 to 0.4."""
    run = run_of(base_folder, tmp_path / "run", targets)
    report = merge(run, tmp_path / "out", onto)
    verdict = verify(run, tmp_path / "out", token_rows())
    assert report.onto == onto
    assert not verdict.faults
    assert verdict.weights.strays == 0
    assert verdict.fold_kl < 1e-9
    assert (verdict.mean_kl < 1e-9) is (onto == "dequantised")
    changed = {layer.module for layer in report.layers if layer.change_fraction > 0}
    assert any(".experts." in module for module in changed) is ("experts" in targets)
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(base_folder / "model.safetensors").keys()
    )


def test_a_mixtures_adapter_is_the_same_in_peft(base_folder, tmp_path) -> None:
    """peft took down_proj of a shared expert, or of a dense layer, for the experts', and dropped its weights."""
    run = run_of(base_folder, tmp_path / "run", "all-linear")
    merge(run, tmp_path / "out", "original")
    plain = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, run.adapter).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.tensor([token_rows()[0]])
    with torch.no_grad():
        assert divergences(merged(ids).logits[0], adapted(ids).logits[0]).mean() < 1e-9
    assert not any(".experts." in name for name, each in adapted.named_parameters() if each.requires_grad)


def test_a_lock_without_experts_is_read_as_it_was(base_folder, tmp_path) -> None:
    run = run_of(base_folder, tmp_path / "run", "all-linear")
    linears = [name for name in run.read_lock().quantized_modules if ".experts." not in name]
    edit_json(run.lock, quantized_modules=linears)
    assert merge(run, tmp_path / "out", "dequantised").onto == "dequantised"
    with torch.inference_mode():
        live = Live.open(run)
    assert live.quantized


def test_a_model_without_attention_goes_on_without_a_cache() -> None:
    """transformers asked its cache for the length of what it holds, of which layers without attention know nothing."""
    config = BambaConfig(**{**SHAPE, **MORE, "mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": []})
    model = BambaForCausalLM(config).eval()
    (answer,) = continued(model, [[6, 7, 8]], [], "cpu")
    assert len(answer) == ANSWER_TOKENS


def test_a_parameter_that_is_one_number_is_whole() -> None:
    """Apertus has such in its activation; to slice one is an IndexError."""
    assert Place("mlp.act_fn.alpha_p").of(torch.tensor(0.8)).item() == pytest.approx(0.8)


def test_experts_that_are_not_quantised_have_adapters_too(base_folder, tmp_path) -> None:
    """Without 4 bits "experts" stood for none, and a plan took transformers' grouped product, which has no float32."""
    run = run_of(base_folder, tmp_path / "run", EXPERTS, quantization="none")
    merge(run, tmp_path / "out", "original")
    verdict = verify(run, tmp_path / "out", token_rows())
    assert not verdict.faults
    assert verdict.mean_kl < 1e-9
    assert verdict.base_kl > 1e-6
