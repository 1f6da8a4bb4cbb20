"""A base without a chat template, from the refusal to a model that anyone can load: the template goes all the way."""

import json
from pathlib import Path

import pytest
from made_bases import byte_level, make_base
from safetensors.torch import load_file, save_file
from stopped_runs import qtune, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtune.events import Notice
from qtune.recipe.chat_templates import BUILT_IN
from qtune.rundir import RunDir, read_json

ENDS = ["<|end|>", "<|im_end|>"]  # of the tokenizer's own, and of what is proposed
TALK = [{"role": "user", "content": "what is x?"}]


def never_trained_on(base: Path, token_id: int) -> None:
    """As the base of Llama 3 is with the tokens of its chat template."""
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][token_id] *= 1e-6
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def test_a_base_without_a_template_is_trained_merged_and_exported_with_the_one_proposed(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = None
    base = make_base(tmp_path / "base", "llama", tokenizer)
    never_trained_on(base, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    few = {"train": {"max_steps": 2}, "evaluate": {"metric": "token_f1", "rows": 2, "max_new_tokens": 4}}
    recipe = write_recipe(tmp_path, base, **few)
    assert qtune("run", recipe, "--output", tmp_path / "run") == 2
    told = capsys.readouterr().err
    assert f"{recipe}:3: model.base: this base has no chat template" in told
    assert '[model] chat_template = "chatml"' in told

    recipe = write_recipe(tmp_path, base, model={"chat_template": "chatml"}, **few)
    assert qtune("run", recipe, "--output", tmp_path / "run") == 0
    run, text = RunDir(tmp_path / "run"), BUILT_IN["chatml"].text
    assert (run.adapter / "chat_template.jinja").read_text() == text
    assert read_json(run.scores)["tuned"]["score"] is not None
    (told,) = (event.text for event in run.events() if isinstance(event, Notice) and "never trained" in event.text)
    assert told.startswith("the base was never trained on <|im_end|>, which ends an answer")
    assert told.endswith('model.chat_template = "alpaca" ends them with <|end|>')

    assert qtune("merge", run.path, "--output", tmp_path / "merged", "--onto", "dequantised") == 0
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    asked = "<s><|im_start|>user\nwhat is x?<|im_end|>\n<|im_start|>assistant\n"
    assert merged.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == asked
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.convert_ids_to_tokens(model.generation_config.eos_token_id) == ENDS

    assert qtune("export", run.path, "--to", "ollama", "--output", tmp_path / "ollama") == 0
    modelfile = (tmp_path / "ollama" / "Modelfile").read_text()
    assert json.dumps("<|im_end|>\n<|im_start|>assistant\n") in modelfile
    assert all(f'PARAMETER stop "{end}"' in modelfile for end in ENDS)
