"""The adapter: counted by hand, silent at the start, the same after saving."""

import json

import forked
import made_models
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qtune.errors import ModelError
from qtune.model import adapter, base
from qtune.recipe.schema import Lora, Model


def loaded(folder, **changes) -> torch.nn.Module:
    return base.load_base(Model(base=str(folder), **changes), "cpu", "float32")


def test_all_linear_layers_but_the_head_get_a_pair(tiny_base) -> None:
    model = adapter.attach(loaded(tiny_base), Lora(rank=4), seed=0)
    trained = sum(p.numel() for p in adapter.trained_parameters(model))
    sizes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 172), (64, 172), (172, 64)]
    assert trained == 2 * sum(4 * (i + o) for i, o in sizes)


def test_a_fresh_adapter_changes_nothing(tiny_base) -> None:
    plain, ids = loaded(tiny_base), torch.arange(6, 30)[None]
    before = plain(input_ids=ids).logits
    torch.testing.assert_close(adapter.attach(plain, Lora(rank=4), seed=0)(input_ids=ids).logits, before)


def test_one_seed_gives_one_start(tiny_base) -> None:
    starts = [adapter.attach(loaded(tiny_base), Lora(rank=4), seed=s).state_dict() for s in (3, 3, 4)]
    name = next(n for n in starts[0] if "lora_A" in n)
    assert torch.equal(starts[0][name], starts[1][name])
    assert not torch.equal(starts[0][name], starts[2][name])


def test_a_target_that_matches_nothing_is_an_error_even_beside_one_that_does(tiny_base) -> None:
    with pytest.raises(ModelError, match=r"'q_prj'.*Did you mean q_proj\?"):
        adapter.attach(loaded(tiny_base), Lora(targets=("v_proj", "q_prj")), seed=0)


def test_masters_are_float32_whatever_cast_them(tiny_base) -> None:
    model = adapter.attach(loaded(tiny_base), Lora(rank=4), seed=0)
    for parameter in adapter.trained_parameters(model):
        parameter.data = parameter.data.bfloat16()
    adapter.use_master_dtype(model, "float32")
    assert {p.dtype for p in adapter.trained_parameters(model)} == {torch.float32}


PATTERNS = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6},
    "alpha_pattern": {"layers.0.self_attn.v_proj": 3.0},
}


@pytest.mark.parametrize(
    "lora",
    [
        Lora(rank=4),
        Lora(rank=4, dora=True),
        Lora(rank=4, rslora=True),
        Lora(rank=4, **PATTERNS),
        Lora(rank=4, rslora=True, **PATTERNS),
    ],
)
def test_plain_peft_in_another_process_reads_the_same_model(tiny_base, tmp_path, lora) -> None:
    model = adapter.attach(loaded(tiny_base, quantization="none"), lora, seed=0)
    with torch.no_grad():
        for parameter in adapter.trained_parameters(model):
            parameter += 0.02 * torch.randn_like(parameter)
    size = adapter.save(model, tmp_path / "adapter", "the/base")
    assert size > 0
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "the/base"
    )
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; from peft import PeftModel\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "m = PeftModel.from_pretrained(m, sys.argv[2]).eval()\n"
        "torch.save(m(input_ids=torch.arange(6, 30)[None]).logits.detach(), sys.argv[3])"
    )
    target = tmp_path / "logits.pt"
    forked.run(["-c", code, tiny_base, tmp_path / "adapter", target]).check_returncode()
    ours = model.eval()(input_ids=torch.arange(6, 30)[None]).logits
    torch.testing.assert_close(torch.load(target), ours, atol=1e-5, rtol=1e-5)


def test_ranks_and_scales_are_those_that_are_asked_for_by_name(tiny_base) -> None:
    layers = dict(adapter.adapted_layers(adapter.attach(loaded(tiny_base), Lora(rank=4, alpha=8, **PATTERNS), seed=0)))
    ranks = {name: layer.r["default"] for name, layer in layers.items()}
    assert {rank: sum(each == rank for each in ranks.values()) for rank in (2, 4, 6)} == {2: 2, 4: 9, 6: 3}
    assert ranks["model.layers.1.self_attn.q_proj"] == 2
    assert layers["model.layers.0.self_attn.v_proj"].scaling["default"] == 3 / 4
    assert layers["model.layers.1.self_attn.v_proj"].scaling["default"] == 2


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ({"q_prj": 2}, r"lora\.rank_pattern\.q_prj: no layer .*Did you mean q_proj\?.* down_proj, gate_proj"),
        ({"layers.7.q_proj": 2}, r"lora\.rank_pattern\.layers\.7\.q_proj: no layer"),
        ({"lm_head": 2}, r"lora\.rank_pattern\.lm_head: no layer with an adapter"),
        (
            {"q_proj": 2, "layers.0.self_attn.q_proj": 3},
            r"model\.layers\.0\.self_attn\.q_proj is matched by 'q_proj', too",
        ),
    ],
)
def test_a_pattern_that_matches_nothing_or_what_another_does_is_refused(tiny_base, patterns, said) -> None:
    """peft says nothing of the first, and saves the others in an order that turns them about."""
    with pytest.raises(ModelError, match=said):
        adapter.attach(loaded(tiny_base), Lora(rank=4, rank_pattern=patterns), seed=0)


def test_an_adapter_of_another_base_is_refused(tiny_base, tmp_path) -> None:
    from conftest import byte_tokenizer, tiny_config
    from transformers import LlamaForCausalLM

    other = tmp_path / "other"
    LlamaForCausalLM(tiny_config(hidden_size=32)).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    adapter.save(adapter.attach(loaded(tiny_base), Lora(rank=4), 0), tmp_path / "adapter", "tiny")
    with pytest.raises(ModelError, match="does not fit this base"):
        adapter.load(loaded(other), tmp_path / "adapter")


def test_a_folder_without_an_adapter_is_named(tiny_base, tmp_path) -> None:
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        adapter.load(loaded(tiny_base), tmp_path)


# peft refused the whole adapter for one name among all; and on `dt_proj`, whose weight Mamba multiplies by itself, an
# adapter would have trained nothing, had the packed weight not stopped the forward pass before.
def test_what_can_have_no_adapter_is_left_out_and_named_where_it_is_asked_for() -> None:
    mamba = made_models.base("mamba")
    assert adapter.left_out(mamba).keys() == {"dt_proj", "out_proj"}
    assert adapter.resolve_targets(mamba, Lora()) == ("in_proj", "x_proj")
    with pytest.raises(
        ModelError, match=r"lora.targets: 'out_proj' can .* type mamba: peft refuses .* in_proj, x_proj"
    ):
        adapter.attach(mamba, Lora(targets=("in_proj", "out_proj")), seed=0)
    assert not adapter.left_out(made_models.base("llama"))


# "2" would have named the decoder layer of that number as well, which peft refuses.
def test_layers_that_are_only_numbered_are_named_by_their_list() -> None:
    model = made_models.base("llama")
    for layer in model.model.layers:
        layer.extra = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
    assert {"extra.0", "extra.2"} < adapter.linear_names(model)
    adapted = adapter.attach(model, Lora(rank=4), seed=0)
    assert sum(".extra.2.lora_A" in name for name, _ in adapted.named_parameters()) == 4


def mixture(kind: str) -> torch.nn.Module:
    sizes = {
        "num_hidden_layers": 1,
        "num_experts": 4,
        "num_local_experts": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    }
    wide = {
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "first_k_dense_replace": 0,
        "n_shared_experts": 1,
    }
    config = CONFIG_MAPPING[kind]()
    return AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[kind](
            **{key: value for key, value in {**made_models.SHAPE, **sizes, **wide}.items() if hasattr(config, key)}
        )
    )


def test_routers_are_left_alone_unless_they_are_named() -> None:
    """They were linears like others where transformers makes them so, and jumps of the routing were trained in."""
    model = mixture("qwen2_moe")
    assert "shared_expert_gate" not in adapter.resolve_targets(model, Lora())
    assert {"down_proj", "q_proj"} < set(adapter.resolve_targets(model, Lora()))
    assert adapter.resolve_targets(model, Lora(targets=("shared_expert_gate",))) == ("shared_expert_gate",)
    with pytest.raises(ModelError, match=r"no linear layer is named 'gate'\. A router that is no linear layer stays"):
        adapter.resolve_targets(model, Lora(targets=("gate",)))


def test_a_router_that_does_more_than_multiply_can_have_no_adapter() -> None:
    """peft's layer gave the logits of one where its own gives them, weights and choice."""
    model = mixture("phimoe")
    assert "router" not in adapter.resolve_targets(model, Lora())
    with pytest.raises(ModelError, match="'router' can have no adapter in a base of type phimoe: it is a router whose"):
        adapter.resolve_targets(model, Lora(targets=("router",)))


@pytest.mark.parametrize("setting", [{"dropout": 0.1}, {"dora": True}])
def test_what_peft_takes_for_experts_has_neither_dropout_nor_dora(setting) -> None:
    with pytest.raises(ModelError, match=f"lora.{next(iter(setting))}: peft takes down_proj, gate_proj, up_proj of a"):
        adapter.attach(mixture("dots1"), Lora(**setting), 0)
    adapter.attach(mixture("dots1"), Lora(targets=("q_proj",), **setting), 0)
