"""The forecast, beside every byte of the same real step: dense, tied, windowed and expert models, real and random."""

from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_config
from real_steps import compare, on_this_machine, packed, recipe_for
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qtune import accelerator
from qtune.accelerator import Capability
from qtune.memory import embedding_offload, output_head
from qtune.memory.techniques import Techniques
from qtune.memory.techniques.embedding_offload import STAGING_BYTES
from qtune.model import base
from qtune.plan.activation_memory import forecaster, trace
from qtune.plan.workload import BatchShape
from qtune.units import MIB

DOCUMENTS = (290, 121, 57, 32)
SHARED = {"vocab_size": 262, "hidden_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def every_rung(layers: int, groups: int, head: str = "host") -> Techniques:
    return Techniques(layers, True, 64, True, head, layers, groups, layers)


def saved(folder: Path, kind: type[PreTrainedModel], config: PreTrainedConfig) -> Path:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied head, norms on queries and keys, five layers."""
    config = Qwen3Config(
        **SHARED,
        intermediate_size=160,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
    )
    return saved(tmp_path_factory.mktemp("qwen3"), Qwen3ForCausalLM, config)


@pytest.fixture(scope="session")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight packed experts in each of four layers."""
    config = Qwen3MoeConfig(
        **SHARED,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    return saved(tmp_path_factory.mktemp("qwen3_moe"), Qwen3MoeForCausalLM, config)


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows of 32 tokens in every layer but the third, four norms a layer, seven layers."""
    config = Gemma3TextConfig(
        **SHARED,
        intermediate_size=128,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=32,
        layer_types=[("full_attention" if i % 3 == 2 else "sliding_attention") for i in range(7)],
    )
    return saved(tmp_path_factory.mktemp("gemma3"), Gemma3ForCausalLM, config)


@pytest.fixture(scope="session")
def gemma4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers, of which the last two read keys and values of earlier ones; an input of its own for each, wide heads
    in every third, a capped head."""
    config = Gemma4TextConfig(
        **SHARED,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=64,
        sliding_window=32,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=262,
        hidden_size_per_layer_input=16,
        layer_types=[("full_attention" if i % 3 == 2 else "sliding_attention") for i in range(6)],
    )
    return saved(tmp_path_factory.mktemp("gemma4"), Gemma4ForCausalLM, config)


def test_a_dense_model(tiny_base: Path) -> None:
    compare(
        tiny_base,
        "float32",
        [Techniques(), Techniques(1), Techniques(2, True), every_rung(2, 2), every_rung(2, 2, "nf4")],
        DOCUMENTS,
    )


def test_attention_kept_and_run_again(tiny_base: Path) -> None:
    """With all its heads at once and in groups, which keep the same in pieces."""
    one, both = (Techniques(2, recomputed_attention=again) for again in (1, 2))
    compare(tiny_base, "float32", [Techniques(2), one, both], DOCUMENTS)
    compare(tiny_base, "float32", [every_rung(2, 2).having(recomputed_attention=0)], DOCUMENTS)


@pytest.mark.parametrize(
    ("optimizer", "accumulates"),
    [
        pytest.param("adamw", True, marks=pytest.mark.long),
        ("adamw", False),
        pytest.param("adamw_8bit", False, marks=pytest.mark.long),
        ("paged_adamw_8bit", True),
        *(pytest.param(name, True, marks=pytest.mark.long) for name in ("ademamix_8bit", "muon")),
    ],
)
def test_every_optimizer(qwen3: Path, optimizer: str, accumulates: bool) -> None:
    """Without accumulation the forecast has the gradients of the layer whose pass is the peak: not yet made there."""
    tolerance = 0.01 if accumulates else 0.02
    compare(qwen3, "bfloat16", [Techniques(5, True)], [300], accumulates, tolerance, optimizer=optimizer)


def test_without_quantisation(tiny_base: Path) -> None:
    compare(tiny_base, "float32", [Techniques(2, True, 64, True, "device", 2, 2)], DOCUMENTS, quantization="none")


@pytest.mark.parametrize(
    "lora",
    [
        {"dropout": 0.1},
        {"dora": True},
        {"targets": ["q_proj"], "master_dtype": "bfloat16"},
        {"rank_pattern": {"q_proj": 2, "down_proj": 32}, "train_tokens": ["a", "b", "c"]},
    ],
)
def test_other_adapters(tiny_base: Path, lora: dict) -> None:
    compare(tiny_base, "float32", [Techniques(2, True, 64)], DOCUMENTS, lora=lora)


def test_rows_of_a_table_that_is_embedding_and_head(qwen3: Path) -> None:
    compare(qwen3, "bfloat16", [Techniques(), Techniques(5, True, 64)], DOCUMENTS, lora={"train_tokens": ["a", "b"]})


@pytest.mark.long
@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_pairs_of_answers(tiny_base: Path, objective: str) -> None:
    """The base's pass is counted with the others: with few labels and many recomputed layers it may hold most."""
    rungs = [Techniques(), Techniques(recomputed_layers=2), every_rung(2, 2)]
    compare(tiny_base, "float32", rungs, DOCUMENTS, objective=objective)


def test_a_tied_head_and_norms_of_heads(qwen3: Path) -> None:
    ladder = [Techniques(), Techniques(3, True), every_rung(5, 2)]
    compare(qwen3, "bfloat16", ladder, DOCUMENTS)


def test_packed_experts(qwen3_moe: Path) -> None:
    """Which experts a token visits is not known before: here the forecast takes the even share, and is off by what
    the busiest expert has more, where streaming leaves little else."""
    compare(qwen3_moe, "bfloat16", [Techniques()], (300, 120, 90), tolerance=0.01)
    compare(qwen3_moe, "bfloat16", [every_rung(4, 2)], (300, 120, 90), tolerance=0.06)


@pytest.mark.long
def test_windowed_layers(gemma3: Path) -> None:
    """What a further layer keeps is taken from a windowed one, which keeps its band: too much for others."""
    compare(gemma3, "bfloat16", [Techniques(), Techniques(7, True, 64)], DOCUMENTS, tolerance=0.02)


@pytest.mark.long
def test_layers_that_share_keys(gemma4: Path) -> None:
    compare(gemma4, "float32", [Techniques(), Techniques(3), Techniques(6, True, 64, True, "host", 6)], DOCUMENTS)


@pytest.mark.parametrize("slice_bytes", [32 * MIB, 100 * 64 * 2])
def test_slices_of_a_head_that_are_copied(qwen3: Path, monkeypatch: pytest.MonkeyPatch, slice_bytes: int) -> None:
    """As a card has to: two at a time, or the one that there is."""
    monkeypatch.setattr(accelerator, "reads_host_memory", lambda device: False)
    monkeypatch.setattr(embedding_offload, "move_embedding_out", lambda model, device: None)
    monkeypatch.setattr(output_head, "HOST_SLICE_BYTES", slice_bytes)
    compare(qwen3, "bfloat16", [Techniques(5, True, 64, False, "host")], [30])


@pytest.mark.parametrize("techniques", [Techniques(host_embedding=True), Techniques(head="host")])
def test_only_rows_for_a_card_pass_through_page_locked_memory(qwen3: Path, techniques: Techniques) -> None:
    """A tied table that goes with the head is the embedding's, too."""
    on_host = {}
    for card in (None, (8, 9)):
        recipe = recipe_for(qwen3)
        asked = forecaster(base.read_config(recipe.model), recipe, "bfloat16", card, context_bytes=0)
        on_host[card] = sum(asked.host_parts(techniques, BatchShape((9,), 9)).values())
    assert on_host[8, 9] - on_host[None] == STAGING_BYTES


@pytest.mark.parametrize(
    ("name", "layers", "groups", "dtype"),
    [
        pytest.param("demo", 6, 2, "bfloat16", marks=pytest.mark.long),
        pytest.param("stories260K-llama", 5, 2, "float32", marks=pytest.mark.long),
        pytest.param("TinyStories-656K-llama", 2, 1, "bfloat16", marks=pytest.mark.long),
        pytest.param("TinyStories-656K-llama", 2, 1, "float32", marks=pytest.mark.long),
    ],
)
def test_real_trained_models(request: pytest.FixtureRequest, name: str, layers: int, groups: int, dtype: str) -> None:
    base = name if name == "demo" else request.getfixturevalue("material") / "models" / name
    ladder = [Techniques(), Techniques(layers - 1, True, 64), every_rung(layers, groups)]
    compare(base, dtype, ladder, [300, 100, 70, 30], tolerance=0.002)


@pytest.mark.long
def test_a_hundred_million_parameters(tmp_path: Path) -> None:
    config = tiny_config(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) > 95e6
    model.save_pretrained(tmp_path)
    compare(tmp_path, "bfloat16", [every_rung(8, 4)], [180, 60, 16])


@pytest.mark.long
@pytest.mark.parametrize(("card", "on_host"), [((8, 6), False), (None, True)])
def test_few_layers_stand_for_many(card: Capability | None, on_host: bool) -> None:
    """Every phase, against a trace of all layers: each kept layer once took a checkpoint off the backward pass."""
    recipe, config = recipe_for("demo"), tiny_config(num_hidden_layers=6)
    batch = BatchShape((50, 30), 60)
    passes = forecaster(config, recipe, "bfloat16", card, 0).passes
    for kept in (0, 1, 4):
        techniques = Techniques(6 - kept, host_checkpoints=on_host, tile_tokens=32)
        whole = trace(config, recipe, "bfloat16", techniques, batch, card).peaks
        for phase, peak in passes.peaks(techniques, batch).items():
            traced = {part: size for part, size in whole[phase].device.items() if part != "standing"}
            assert sum(peak.device.values()) == pytest.approx(sum(traced.values()), rel=0.03), (kept, phase)
            assert peak.host.get("checkpoints", 0) == whole[phase].host.get("checkpoints", 0)


def test_what_the_host_holds_is_found_without_tracing_the_rest(tiny_base: Path) -> None:
    labelled = int((packed(DOCUMENTS, 250)["labels"] != -100).sum())  # as of the dense model, which is traced already
    forecasts, batch = on_this_machine(recipe_for(tiny_base), "float32"), BatchShape(DOCUMENTS, labelled)
    for techniques in (Techniques(), Techniques(2, True), every_rung(2, 2)):
        found = forecasts.forecast(techniques, batch)
        assert forecasts.host_parts(techniques, batch) == found.host
    assert forecasts.host_parts(Techniques(1, True), batch)["checkpoints"] == sum(DOCUMENTS) * 64 * 4
