"""The text model of a checkpoint that also sees: trained without its towers, and merged into a whole model again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from made_towers import AHEAD, KINDS, TOWERS, make, tensors
from peft import PeftModel
from safetensors.torch import load_file, save_file
from stopped_runs import qtune, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM

from qtune.errors import ModelError
from qtune.model.base import load_base
from qtune.model.open_model import open_run
from qtune.recipe.schema import Model
from qtune.recipe.text_part import TextPart
from qtune.report.serving_snippets import TEXT_ALONE
from qtune.rundir import RunDir, read_json

TRAIN = {"max_steps": 2, "learning_rate": 1e-2}
UNSCORED = {"metric": "none", "general": "none"}


OTHERS = ("gemma4", "llama4", "mistral3", "qwen3.5")


@pytest.mark.parametrize("kind", ["gemma3", *(pytest.param(kind, marks=pytest.mark.long) for kind in OTHERS)])
def test_it_is_tuned_and_a_whole_model_again(kind: str, tmp_path: Path) -> None:
    """From data to merge; a whole run and its merge take four seconds."""
    base, run, merged = make(kind, tmp_path / "base"), tmp_path / "run", tmp_path / "merged"
    text = TextPart.of(read_json(base / "config.json"))
    apart = [path for path in base.glob("*.safetensors") if not any(map(text.name, _names(base, path)))]
    assert apart
    aside = tmp_path / "aside"
    aside.mkdir()
    for path in apart:  # as the hub's cache has it: what holds no text was never downloaded
        shutil.move(path, aside)
    model = {"base": str(base), "compute_dtype": "float32"}
    recipe = write_recipe(tmp_path, base, model=model, train=TRAIN, evaluate=UNSCORED)
    assert qtune("run", recipe, "--output", run) == 0
    for path in aside.iterdir():
        shutil.move(path, base)
    assert qtune("merge", run, "--output", merged) == 0

    before, after = tensors(base), tensors(merged)
    assert before.keys() == after.keys()
    towers = [name for name in before if name.startswith(TOWERS[kind])]
    for name in [*towers, AHEAD]:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name])
    assert (base / "config.json").read_bytes() == (merged / "config.json").read_bytes()
    lock = read_json(run / "lock.json")
    assert lock["base"]["has_towers"]
    assert not [
        name for name in lock["quantized_modules"] if not name.startswith(("model.layers.", "model.per_layer_"))
    ]

    whole, told = type(KINDS[kind]()).from_pretrained(merged, dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"]
    ids = torch.arange(10, 60)[None]
    tuned = open_run(RunDir.open(run))
    with torch.no_grad():
        expected = tuned.model(input_ids=ids, use_cache=False).logits
        found = whole(input_ids=ids, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-4)

    plain = _as_the_card_says(base)
    with torch.no_grad():
        original = plain(input_ids=ids).logits
        moved = PeftModel.from_pretrained(plain, run / "adapter")(input_ids=ids).logits
    assert (moved - expected).abs().mean() < (original - expected).abs().mean()  # apart from each other by NF4 alone


def _names(base: Path, file: Path) -> list[str]:
    shards = read_json(base / "model.safetensors.index.json")["weight_map"]
    return [name for name, shard in shards.items() if shard == file.name]


def _as_the_card_says(base: Path) -> torch.nn.Module:
    said = {"base": base, "AutoConfig": AutoConfig}
    exec(TEXT_ALONE, said)
    return AutoModelForCausalLM.from_pretrained(
        base, config=said["config"], key_mapping=said["names"], dtype=torch.float32
    )


def test_a_checkpoint_without_its_text_model_is_named(tmp_path: Path) -> None:
    base = make("gemma3", tmp_path / "base")
    for path in base.glob("model-*.safetensors"):
        held = {name: tensor for name, tensor in load_file(path).items() if "layers.1.mlp.up_proj" not in name}
        save_file(held, path, {"format": "pt"})
    index = read_json(base / "model.safetensors.index.json")
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if "layers.1.mlp.up_proj" not in n}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight of the text model"):
        load_base(Model(base=str(base)), "cpu", "float32")
