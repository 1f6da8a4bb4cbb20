"""Which tensors of a checkpoint are the text model's, by the names that checkpoints on the hub have for them."""

import pytest

from qtune.recipe.text_part import TextPart

NAMES = {
    "model.language_model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",  # transformers 5, Qwen3.5
    "language_model.model.layers.1.mlp.up_proj.weight": "model.layers.1.mlp.up_proj.weight",  # Gemma 3, Mistral 3
    "model.text_model.norm.weight": "model.norm.weight",  # Idefics 3
    "language_model.lm_head.weight": "lm_head.weight",
    "model.language_model.lm_head.weight": "lm_head.weight",
    "lm_head.weight": "lm_head.weight",
    "model.visual.blocks.0.mlp.weight": None,
    "vision_tower.language_model.weight": None,
    "mtp.layers.0.mlp.weight": None,
    "model.language_model.layers.2.mlp.up_proj.weight": None,
}


@pytest.mark.parametrize("stored", NAMES)
def test_names_within_a_larger_checkpoint(stored: str) -> None:
    assert TextPart(is_within=True, layers=2).name(stored) == NAMES[stored]


@pytest.mark.parametrize("ahead", ["mtp.fc.weight", "model.mtp.fc.weight", "model.mtp_block.0.weight"])
def test_heads_that_guess_ahead_are_no_part_of_it(ahead: str) -> None:
    part = TextPart.of({"model_type": "qwen3", "num_hidden_layers": 61})
    assert part.name(ahead) is None
    assert part.name("model.layers.61.mlp.weight") is None
    assert part.name("model.layers.60.mlp.weight") == "model.layers.60.mlp.weight"


def test_what_runs_by_code_beside_it_or_has_no_class_is_not_taken_apart() -> None:
    whole = {"model_type": "a", "text_config": {"model_type": "qwen3"}}
    assert TextPart.of(whole).is_within
    assert not TextPart.of({**whole, "auto_map": {"AutoModelForCausalLM": "code.py"}}).is_within
    assert not TextPart.of({**whole, "text_config": {"model_type": "qwen3_vl_text"}}).is_within
