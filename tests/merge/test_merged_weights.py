"""One base and one adapter, tensor by tensor: the trained weights exactly, or a refusal."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from conftest import END, byte_tokenizer, tiny_config
from made_runs import edit_json, kept_run, make_run, token_rows
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qtune.errors import ModelError
from qtune.gguf.export import export
from qtune.hardware import find_device, reset_peak, resident_bytes
from qtune.lock import Quantization
from qtune.merge import nf4_round_trip
from qtune.merge.merge import merge
from qtune.merge.merged_weights import Fold
from qtune.merge.nf4_round_trip import restore_quantized
from qtune.merge.verify import verify
from qtune.model import adapter, base, fingerprint
from qtune.recipe.base_kind import INDEX_NAME
from qtune.recipe.schema import Lora, Model


def fold(run, folder: Path, onto: str = "dequantised", dtype: str = "auto"):
    """The merged tensors, and what changed."""
    opened = Fold.open(run, dtype)
    folder.mkdir()
    shards = [opened.write_shard(folder, shard, onto, lambda name: None) for shard in opened.checkpoint.shards]
    opened.write_small_files(folder)
    layers = [layer for shard in shards for layer in shard.layers]
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}, layers


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(tie_word_embeddings=True)).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float16", "float32"])
def test_a_restored_weight_is_the_live_models_bit_for_bit(tiny_base, double, compute_dtype) -> None:
    model = Model(base=str(tiny_base), double_quantization=double)
    live = base.load_base(model, "cpu", compute_dtype)
    names = base.quantized_modules(live)
    original = load_file(tiny_base / "model.safetensors")
    quantization = Quantization("nf4", double)
    assert len(names) == 14
    for name in names:
        weight = live.get_submodule(name).weight
        restored = restore_quantized(original[f"{name}.weight"].to(getattr(torch, compute_dtype)), quantization)
        assert torch.equal(restored, dequantize_4bit(weight.data, weight.quant_state))


def test_the_whole_dequantised_base_is_the_live_one_bit_for_bit(tiny_base, tmp_path) -> None:
    """With nothing added: embeddings, norms and head too are what the run held, not what the checkpoint says."""
    run = make_run(tmp_path / "run", tiny_base, strength=0.0)
    merged, _ = fold(run, tmp_path / "out", dtype="float32")
    live = base.load_base(Model(base=str(tiny_base)), "cpu", "bfloat16")
    for name, parameter in live.named_parameters():
        held = (
            dequantize_4bit(parameter.data, parameter.quant_state) if hasattr(parameter, "quant_state") else parameter
        )
        assert torch.equal(merged[name], held.float()), name


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
def test_onto_the_original_weights_it_is_pefts_merge(tiny_base, tmp_path, lora) -> None:
    run = make_run(tmp_path / "run", tiny_base, lora)
    merged, _ = fold(run, tmp_path / "out", "original")
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(plain, run.adapter).merge_and_unload().state_dict()
    assert set(merged) == set(expected)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_a_whole_module_that_was_trained_replaces_the_bases(tiny_base, tmp_path) -> None:
    run = make_run(tmp_path / "run", tiny_base, {"modules_to_save": ["lm_head"]})
    path = run.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    trained = torch.randn(262, 64)
    tensors["base_model.model.lm_head.weight"] = trained
    save_file(tensors, path)
    merged, _ = fold(run, tmp_path / "out")
    assert torch.equal(merged["lm_head.weight"], trained)


def test_each_layer_says_how_far_it_moved_beside_its_quantisation_error(tiny_base, tmp_path) -> None:
    run = make_run(tmp_path / "run", tiny_base)
    merged, layers = fold(run, tmp_path / "out", "original")
    original = load_file(tiny_base / "model.safetensors")
    assert len(layers) == 14
    for layer in layers:
        before, after = original[f"{layer.module}.weight"], merged[f"{layer.module}.weight"]
        assert layer.change_fraction == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)
        assert 0.05 < layer.quantization_error_fraction < 0.15  # NF4 on normal weights: 9 %


def test_without_quantisation_there_is_no_quantisation_error(tiny_base, tmp_path) -> None:
    run = make_run(tmp_path / "run", tiny_base, quantization="none", compute_dtype="float32")
    _, layers = fold(run, tmp_path / "out", "original")
    assert {layer.quantization_error_fraction for layer in layers} == {None}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_float_is_written_in_the_dtype_asked_for_and_the_config_says_so(tiny_base, tmp_path, dtype) -> None:
    merged, _ = fold(make_run(tmp_path / "run", tiny_base), tmp_path / "out", dtype=dtype)
    assert {tensor.dtype for tensor in merged.values()} == {getattr(torch, dtype)}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**json.loads((tiny_base / "config.json").read_text()), "dtype": dtype}


def test_auto_keeps_the_dtype_of_the_checkpoint(tied_base, tmp_path) -> None:
    merged, _ = fold(make_run(tmp_path / "run", tied_base), tmp_path / "out")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


@pytest.mark.parametrize("onto", ["dequantised", "original"])
def test_threads_change_no_bit(tiny_base, tmp_path, monkeypatch, onto) -> None:
    run = make_run(tmp_path / "run", tiny_base, strength=0.3)
    monkeypatch.setattr(nf4_round_trip, "WEIGHTS_AT_ONCE", 300)
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(fold(run, tmp_path / str(threads), onto))
        finally:
            torch.set_num_threads(before)
    (alone, layers), (shared_out, others) = found
    assert layers == others
    assert set(alone) == set(shared_out)
    assert all(torch.equal(alone[name], shared_out[name]) for name in alone)


def test_a_value_too_large_for_float16_is_caught_and_named(tiny_base, tmp_path) -> None:
    run = make_run(tmp_path / "run", tiny_base, strength=1e6)
    with pytest.raises(ModelError, match=r"down_proj\.weight: is not finite in torch\.float16 .*--dtype bfloat16"):
        fold(run, tmp_path / "out", dtype="float16")
    fold(run, tmp_path / "wider", dtype="bfloat16")


def another_base(run, tied_base) -> None:
    edit_json(run.lock, model=Model(base=str(tied_base)).model_dump(mode="json"))


def test_another_base_is_refused_at_a_glance(tiny_base, tied_base, tmp_path) -> None:
    run = make_run(tmp_path / "run", tiny_base)
    another_base(run, tied_base)
    with pytest.raises(ModelError, match=r"is not the base of .*run; its weights are others"):
        Fold.open(run, "auto")


@pytest.mark.parametrize(
    "make", [partial(merge, onto="dequantised"), partial(export, to="adapter-gguf")], ids=["merge", "export"]
)
def test_a_base_that_a_glance_does_not_tell_is_refused_by_hash(tiny_base, tmp_path, make) -> None:
    """As with a lock of before there were glances; nothing is left of what was made from it."""
    run = make_run(tmp_path / "run", tiny_base)
    other = tmp_path / "base"
    shutil.copytree(tiny_base, other)
    weights = load_file(other / "model.safetensors")
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] + 1}, other / "model.safetensors")
    another_base(run, other)
    lock = json.loads(run.lock.read_text())
    edit_json(run.lock, base={key: lock["base"][key] for key in ("name", "folder", "sha256")})
    with pytest.raises(ModelError, match="SHA-256") as refusal:
        make(run, tmp_path / "out" / "made")
    assert fingerprint.fingerprint(other) in str(refusal.value)
    assert fingerprint.fingerprint(tiny_base) in str(refusal.value)
    assert not list((tmp_path / "out").iterdir())


def test_the_hashing_of_a_base_ends_with_the_work_that_failed(tiny_base, tmp_path) -> None:
    fold = Fold.open(make_run(tmp_path / "run", tiny_base), "auto")
    with pytest.raises(KeyboardInterrupt), fold.proving_base(lambda name: None):
        raise KeyboardInterrupt


def rename(run, old: str, new: str) -> None:
    path = run.adapter / "adapter_model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(path).items()}, path)


def test_pairs_that_match_no_weight_are_all_named(tiny_base, tmp_path) -> None:
    run = make_run(tmp_path / "run", tiny_base)
    rename(run, "layers.1.mlp", "layers.7.mlp")
    with pytest.raises(ModelError) as refusal:
        Fold.open(run, "auto")
    for part in ("gate_proj", "up_proj", "down_proj"):
        assert f"model.layers.7.mlp.{part}.weight is not in it" in str(refusal.value)


def test_a_pair_of_another_shape_is_named(tiny_base, tmp_path) -> None:
    run = make_run(tmp_path / "run", tiny_base, {"target_modules": ["q_proj"]})
    rename(run, "layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj")
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.k_proj\.weight has another shape"):
        Fold.open(run, "auto")


def test_a_quantised_module_the_checkpoint_calls_otherwise_is_named(tiny_base, tmp_path) -> None:
    run = make_run(tmp_path / "run", tiny_base)
    edit_json(run.lock, quantized_modules=["model.layers.0.self_attn.qkv"])
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.qkv\.weight is not in it"):
        Fold.open(run, "auto")


@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=["embedding saved", "head saved", "head adapted"],
)
@pytest.mark.filterwarnings("ignore:Model")
def test_a_change_to_one_side_of_a_tied_tensor_is_refused(tied_base, tmp_path, lora) -> None:
    """Merged, such a change moved both sides: logits were off by up to 287."""
    run = make_run(tmp_path / "run", tied_base, lora)
    with pytest.raises(ModelError, match=r"tie_word_embeddings|is not in it"):
        Fold.open(run, "auto")


def test_tied_weights_stay_one_tensor(tied_base, tmp_path) -> None:
    merged, _ = fold(make_run(tmp_path / "run", tied_base), tmp_path / "out")
    assert "lm_head.weight" not in merged
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_shards_keep_their_names_and_the_index_counts_their_bytes(tiny_base, tmp_path) -> None:
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(sharded, max_shard_size="50KB")
    run = make_run(tmp_path / "run", sharded)
    merged, _ = fold(run, tmp_path / "out", dtype="float16")
    before, after = (json.loads((folder / INDEX_NAME).read_text()) for folder in (sharded, tmp_path / "out"))
    assert before["weight_map"] == after["weight_map"]
    assert len(set(after["weight_map"].values())) > 3
    assert after["metadata"]["total_size"] == sum(tensor.nbytes for tensor in merged.values())
    for name, shard in after["weight_map"].items():
        assert name in load_file(tmp_path / "out" / shard)
    for name, parameter in AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters():
        assert torch.equal(parameter, merged[name])


@pytest.mark.long
def test_memory_is_a_few_copies_of_the_largest_tensor(tmp_path) -> None:
    """Twelve linears of 16 MiB; bitsandbytes needs five float32 copies of one to quantise it on a CPU.

    What the threads keep for themselves is about one more. Folded twice: what was imported and compiled is not counted.
    """
    folder = tmp_path / "wide"
    torch.manual_seed(0)
    wide = tiny_config(hidden_size=512, intermediate_size=8192, num_hidden_layers=4)
    LlamaForCausalLM(wide).save_pretrained(folder)
    largest = 512 * 8192 * 4
    assert (folder / "model.safetensors").stat().st_size > 12 * largest
    run = make_run(tmp_path / "run", folder)
    opened = Fold.open(run, "bfloat16")
    write = partial(opened.write_shard, tmp_path, opened.checkpoint.shards[0], "dequantised", lambda name: None)
    write()
    taken = []
    for _ in range(5):  # beside other work threads may hold their parts for longer, but not every time
        reset_peak(find_device())
        before, peak = resident_bytes()
        if peak > before + largest:
            pytest.skip("this system does not let a process reset its own peak (proc(5), clear_refs)")
        write()
        taken.append(resident_bytes()[1] - before)
    assert min(taken) < 4 * largest


# Its layers are Conv1D, with weights (in, out); 4 bits and the adapter take them for linears, and the merge found
# "another shape". In 16 bits peft notes `fan_in_fan_out`, for which the merge was refused.
@pytest.mark.parametrize(
    ("quantization", "onto", "variant"),
    [
        ("nf4", "dequantised", {}),
        ("nf4", "original", {}),
        ("none", "original", {}),
        ("none", "original", {"dora": True}),
    ],
)
def test_gpt2s_transposed_weights_are_merged(tmp_path, quantization, onto, variant) -> None:
    torch.manual_seed(0)
    config = CONFIG_MAPPING["gpt2"](vocab_size=262, n_embd=64, n_layer=2, n_head=4, bos_token_id=6, eos_token_id=END)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    run = kept_run(
        tmp_path / "run",
        Model(base=str(tmp_path / "base"), quantization=quantization),
        lambda model: adapter.attach(model, Lora(rank=4, **variant), 0),
        "float32",
        stop_token_ids=(END,),
    )
    report = merge(run, tmp_path / "out", onto)
    verdict = verify(run, tmp_path / "out", token_rows())
    assert not verdict.faults
    assert verdict.weights.strays == 0
    assert sum(layer.change_fraction > 0 for layer in report.layers) == 8
    merged, before = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "base"))
    assert {name: tensor.shape for name, tensor in merged.items()} == {n: t.shape for n, t in before.items()}
