"""The model card: what the hub reads in it, and what must never be in it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from made_events import DATA, LOCK, SCORES, whole_run_in

from qtune.recipe.schema import Recipe
from qtune.report import model_card, run_record
from qtune.rundir import RunDir, write_json

SECRET, HOME = "hf_aaaabbbbccccddddeeeeffff", "/home/somebody/secret-project"
RECIPE = {
    "name": "medical",
    "about": "Answers medical questions briefly",
    "model": {"base": "Qwen/Qwen3-4B-Instruct"},
    "data": {"train": "medalpaca/flashcards", "system": f"The password is {SECRET}"},
}


def run_with(folder: Path, recipe: dict[str, Any] = RECIPE, **lock: Any) -> RunDir:
    run = whole_run_in(folder)
    full = Recipe.model_validate(recipe).model_dump(mode="json")
    quantization = {"type": "nf4", "double": True}
    write_json(run.lock, {**LOCK, "recipe": full, "data_sha256": "d" * 64, "quantization": quantization, **lock})
    return run


def text_of(run: RunDir, what: model_card.What = "adapter", address: str | None = None) -> str:
    return model_card.card(run_record.read(run), what, address)


def header(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text.split("---\n")[1]))


def test_the_header_is_what_the_hub_reads(tmp_path: Path) -> None:
    found = header(text_of(run_with(tmp_path)))
    assert found["base_model"] == "Qwen/Qwen3-4B-Instruct"
    assert found["base_model_relation"] == "adapter"
    assert found["library_name"] == "peft"
    assert found["pipeline_tag"] == "text-generation"
    assert found["datasets"] == ["medalpaca/flashcards"]
    assert {"lora", "qlora"} <= set(found["tags"])
    assert "license" not in found  # the base's files do not say one
    (index,) = found["model-index"]
    (result,) = index["results"]
    assert index["name"] == "medical"
    assert result["dataset"]["type"] == "medalpaca/flashcards"
    metrics = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert metrics == {"loss": SCORES["tuned"]["held_out_loss"], "token_f1": SCORES["tuned"]["score"]}


def test_the_hubs_own_reader_understands_it(tmp_path: Path) -> None:
    found = ModelCard(text_of(run_with(tmp_path)))
    assert found.data.base_model == "Qwen/Qwen3-4B-Instruct"
    assert {result.metric_type for result in found.data.eval_results} == {"loss", "token_f1"}
    assert found.text.lstrip().startswith("# medical")


def test_the_text_tells_the_run_and_how_to_use_it(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    write_json(run.scores, {**SCORES, "difference": {"score": 0.221, "low": 0.19, "high": 0.252}})
    text = text_of(run, address="me/medical")
    for fact in (
        "A LoRA adapter for [Qwen/Qwen3-4B-Instruct](https://huggingface.co/Qwen/Qwen3-4B-Instruct)",
        "| shared words on 100 rows | 0.181 (0.15-0.21) → 0.402 (0.36-0.45) |",
        "| difference | +0.221 (+0.190 to +0.252) |",
        "PeftModel.from_pretrained(model, 'me/medical')",
        "--max-lora-rank 16 --lora-modules medical=me/medical",
        "| adapter | LoRA, rank 16, alpha 32, on all-linear |",
        f"| rows | {DATA['train_rows']:,} to train on",
        f"| data | SHA-256 {'d' * 64} |",
        "| peak device memory | 4.8 GiB of 8.0 GiB |",
        "torch 2.13.0, peft 0.21.2",
    ):
        assert fact in text


def test_the_licence_is_what_the_base_says(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    run = run_with(tmp_path, base={**LOCK["base"], "folder": str(base)})
    for written, expected in (("license: apache-2.0", "apache-2.0"), ('license: "llama3.1"', "llama3.1")):
        (base / "README.md").write_text(f"---\ntags: [a]\n{written}\n---\n# Base\n")
        assert header(text_of(run))["license"] == expected
    for nonsense in ("license: [a, b]", "license: <script>", "lisense: mit"):
        (base / "README.md").write_text(f"---\n{nonsense}\n---\nlicense: mit\n")
        assert "license" not in header(text_of(run))


def secret_run(folder: Path) -> RunDir:
    """A run made of local files, whose every private corner holds a secret or a path."""
    recipe = {
        **RECIPE,
        "model": {"base": f"{HOME}/base", "chat_template": f"{HOME}/t.jinja"},
        "data": {"train": f"{HOME}/rows.jsonl", "held_out": f"{HOME}/held.jsonl", "system": SECRET},
    }
    base = {"name": f"{HOME}/base", "folder": f"{HOME}/base", "sha256": "b" * 64}
    run = run_with(folder, recipe, base=base)
    run.recipe.write_text(f"# token {SECRET}, in {HOME}\n")
    sample = {**SCORES["samples"][0], "prompt": SECRET, "tuned": SECRET}
    write_json(run.scores, {**SCORES, "samples": [sample]})
    write_json(run.data, {**DATA, "source": f"{HOME}/rows.jsonl", "sample": [[SECRET, True]], "notices": [HOME]})
    verdict = {"passed": True, "mean_kl": 1e-6, "agreement_fraction": 1.0, "greedy": [{"prompt": SECRET}]}
    merge = {"onto": "dequantised", "dtype": "bfloat16", "output": f"{HOME}/merged", "verdict": verdict}
    write_json(run.merge, merge)
    return run


@pytest.mark.parametrize("what", ["adapter", "merged"])
def test_neither_secrets_nor_rows_nor_folders_are_in_it(tmp_path: Path, what: model_card.What) -> None:
    run = secret_run(tmp_path)
    text = text_of(run, what)
    for private in (SECRET, "somebody", "secret-project", str(tmp_path), SCORES["samples"][0]["reference"]):
        assert private not in text
    found = header(text)
    assert "base_model" not in found
    assert "datasets" not in found
    assert found["model-index"][0]["results"][0]["dataset"]["name"] == "held.jsonl, held-out rows"


def test_a_merged_model_is_another_kind_of_thing(tmp_path: Path) -> None:
    run = secret_run(tmp_path)
    text = text_of(run, "merged", "me/merged")
    assert header(text)["library_name"] == "transformers"
    assert "base = 'me/merged'\nmodel = AutoModelForCausalLM.from_pretrained(base" in text
    assert "PeftModel" not in text
    assert "Held against the live adapter on held-out rows: mean KL 1.0e-06 nats" in text


def test_an_adapter_that_vllm_does_not_take_is_not_offered_to_it(tmp_path: Path) -> None:
    for number, lora in enumerate(({"dora": True}, {"rank": 1024})):
        text = text_of(run_with(tmp_path / str(number), {**RECIPE, "lora": lora}))
        assert "vllm" not in text
        assert "PeftModel" in text


def test_of_a_mixture_it_says_where_its_experts_are_not_rounded(tmp_path: Path) -> None:
    experts = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.down_proj"]
    assert "transformers leaves them in 16 bits" in text_of(run_with(tmp_path / "a", quantized_modules=experts))
    shared = ["model.layers.0.mlp.shared_experts.down_proj"]
    assert "leaves them in 16 bits" not in text_of(run_with(tmp_path / "b", quantized_modules=shared))


def test_it_is_written_into_the_adapter_folder_and_nowhere_else(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    before = sorted(run.path.iterdir())
    model_card.write_card(run)
    assert (run.adapter / "README.md").read_text(encoding="utf-8") == text_of(run)
    assert sorted(run.path.iterdir()) == before
    run.adapter.joinpath("README.md").unlink()
    run.adapter.rmdir()
    model_card.write_card(run)
    assert not run.adapter.exists()


def test_without_scores_it_says_so(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    run.scores.unlink()
    text = text_of(run)
    assert "It was not scored." in text
    assert "model-index" not in header(text)
