"""Runs that train rows of the embedding beside A and B: resumed, merged and exported with them."""

import json
from pathlib import Path

import forked
import pytest
import torch
from conftest import byte_tokenizer, tiny_config
from safetensors.torch import load_file
from stopped_runs import assert_same, copy, qtune, told, write_recipe
from transformers import LlamaForCausalLM

from qtune.events import StepDone
from qtune.model import adapter, base
from qtune.recipe.schema import Model

TOKENS = ["<|user|>", "<|assistant|>", "<|end|>"]
ROWS = ".token_adapter.trainable_tokens_delta"


@pytest.fixture(scope="module", params=[False, True], ids=["two tables", "one table"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(tie_word_embeddings=request.param)).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    lora = {"rank": 4, "alpha": 8, "dropout": 0, "train_tokens": TOKENS}
    recipe = write_recipe(folder, folder / "base", lora=lora, train={"learning_rate": 2e-2})
    assert qtune("run", recipe, "--output", folder / "run") == 0
    return folder / "run"


def test_a_run_trains_them_and_goes_on_to_the_bit(run: Path, tmp_path: Path) -> None:
    losses = [event.loss for event in told(run, StepDone)]
    assert losses[-1] < losses[0] - 0.05
    table = load_file(run.parent / "base" / "model.safetensors")["model.embed_tokens.weight"]
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    ids = byte_tokenizer().convert_tokens_to_ids(TOKENS)
    moved = (saved[f"base_model.model.model.embed_tokens{ROWS}"] - table[ids]).abs().amax(1)
    assert (moved > 1e-3).all()
    again = copy(run, tmp_path / "run", up_to=4)
    assert qtune("resume", again) == 0
    assert_same(run, again)


def test_what_is_merged_and_exported_has_them(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert qtune("merge", run, "--output", tmp_path / "merged") == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")["model.embed_tokens.weight"]
    before = load_file(run.parent / "base" / "model.safetensors")["model.embed_tokens.weight"]
    ids = byte_tokenizer().convert_tokens_to_ids(TOKENS)
    saved = load_file(run / "adapter" / "adapter_model.safetensors")[f"base_model.model.model.embed_tokens{ROWS}"]
    assert torch.equal(merged[ids], saved.to(merged.dtype))
    others = [token for token in range(len(merged)) if token not in ids]
    assert torch.equal(merged[others], before[others].bfloat16().to(merged.dtype))  # as the run held it
    assert qtune("export", run, "--to", "adapter-gguf", "--output", tmp_path / "adapter") == 2
    assert "the run trained rows of" in capsys.readouterr().err


def test_a_merge_without_them_is_found_out(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qtune.merge.lora_delta import RowsDelta

    monkeypatch.setattr(RowsDelta, "apply", lambda self, weight, rows: weight.float())
    assert qtune("merge", run, "--output", tmp_path / "merged") == 1
    verdict = json.loads((run / "merge.json").read_text())["verdict"]
    assert not verdict["passed"]
    assert "embed_tokens" in verdict["weights"]["worst_tensor"] or "lm_head" in verdict["weights"]["worst_tensor"]


def test_plain_peft_reads_the_same_model(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, BitsAndBytesConfig\n"
        "from peft import PeftModel\n"
        "bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True)\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, quantization_config=bits)\n"
        "m = PeftModel.from_pretrained(m, sys.argv[2])\n"
        "torch.save(m.train()(input_ids=torch.arange(250, 262)[None]).logits.detach(), sys.argv[3])"
    )
    folder = run.parent / "base"
    forked.run(["-c", code, folder, run / "adapter", tmp_path / "logits.pt"]).check_returncode()
    ours = adapter.load(base.load_base(Model(base=str(folder)), "cpu", "float32"), run / "adapter")
    found = ours(input_ids=torch.arange(250, 262)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), found, atol=1e-4, rtol=1e-4)


# A row of next to nothing is divided by its length in the first norm, and so are its gradients.
def test_a_row_that_the_base_was_never_trained_on_begins_as_the_mean(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, tokenizer = LlamaForCausalLM(tiny_config()), byte_tokenizer()
    unseen, seen = tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>"])
    model.model.embed_tokens.weight.data[unseen] = 0
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lora, train = {"rank": 4, "train_tokens": ["<|end|>", "<|user|>"]}, {"learning_rate": 1e-9, "max_steps": 1}
    recipe = write_recipe(tmp_path, tmp_path / "base", lora=lora, train=train)
    assert qtune("run", recipe, "--output", tmp_path / "run") == 0
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for table in ("model.embed_tokens", "lm_head"):
        weight, rows = model.get_submodule(table).weight.detach(), saved[f"base_model.model.{table}{ROWS}"]
        torch.testing.assert_close(rows[0], weight[seen], rtol=0.01, atol=1e-4)
        torch.testing.assert_close(rows[1], weight.mean(0), rtol=0.01, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["<|usr|>"], r"lora.train_tokens: '<|usr|>' is no token of this base. Did you mean <|user|>?"),
        (["nothing like it"], "Its special ones are <s>, <|end|>"),
        (["<|user|>", "<|user|>"], "lora.train_tokens must be a list of tokens, each once"),
        ("<|user|>", "lora.train_tokens must be a list of tokens, each once"),
        ([""], "lora.train_tokens must be a list of tokens, each once"),
    ],
)
def test_what_is_no_token_is_refused_before_anything_is_loaded(
    tokens: object, said: str, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = write_recipe(tmp_path, tiny_base, lora={"train_tokens": tokens})
    assert qtune("run", recipe, "--output", tmp_path / "run") != 0
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
