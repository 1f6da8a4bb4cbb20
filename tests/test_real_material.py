"""Real weights and rows: train, then read adapter and merge back with plain libraries in a fresh process."""

import json
from pathlib import Path

import forked
import pytest

from qtune import cli
from qtune import ready as readiness
from qtune.recipe.load import load
from qtune.rundir import RunDir, read_json

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
)
# Nothing of qtune: what a person would write to use the result. The model stays in training mode (there is no dropout)
# because bitsandbytes repacks NF4 weights in eval mode on processors with AVX-512 BF16, and fails on widths that 32
# does not divide.
PLAIN_LOSS = """\
import json, sys, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from peft import PeftModel
base, adapter, dtype, rows = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3]), json.load(open(sys.argv[4]))
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=dtype)
if adapter:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=nf4)
    model = PeftModel.from_pretrained(model, adapter)
else:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model.train()
nats = count = 0
with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
    for ids, labels in rows:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        wanted = torch.tensor(labels[1:])
        nats += torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum").item()
        count += int((wanted != -100).sum())
print(nats / count)
"""


def recipe_text(material: Path, base: str, rows: int, steps: int) -> str:
    return f"""
name = "real"
[model]
base = "{material}/models/{base}"
chat_template = "template.jinja"
[lora]
rank = 16
[data]
train = "{material}/datasets/medquad/medquad_3000.jsonl"
max_rows = {rows}
max_tokens = 512
on_long = "truncate"
held_out_fraction = 0.1
[train]
learning_rate = 3e-3
gradient_accumulation = 2
epochs = 100
max_steps = {steps}
[evaluate]
rows = 4
max_new_tokens = 8
"""


def plain_loss(base: Path, adapter: Path | str, dtype: str, rows: Path) -> float:
    """The held-out loss by plain transformers and peft, in a process of its own."""
    return float(forked.run(["-c", PLAIN_LOSS, base, adapter, dtype, rows]).stdout)


@pytest.mark.long
@pytest.mark.parametrize("base", ["stories260K-llama", "TinyStories-656K-llama"])
def test_adapter_and_merge_are_the_trained_model_elsewhere(material, tmp_path, monkeypatch, base) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    (tmp_path / "real.toml").write_text(recipe_text(material, base, rows=200, steps=25))
    assert cli.main(["run", "real.toml", "--output", "out"]) == 0
    run = RunDir.open(tmp_path / "out")
    scores = read_json(run.scores)
    assert scores["tuned"]["held_out_loss"] < scores["base"]["held_out_loss"] - 0.3

    held_out = readiness.get_ready(load(tmp_path / "real.toml")).prepared.held_out
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([(example.input_ids, example.labels) for example in held_out]))
    dtype = read_json(run.lock)["compute_dtype"]
    folder = material / "models" / base
    assert plain_loss(folder, run.adapter, dtype, rows) == pytest.approx(scores["tuned"]["held_out_loss"], abs=1e-3)

    assert cli.main(["merge", "out", "--output", "merged", "--dtype", "float32"]) == 0
    verdict = read_json(run.merge)["verdict"]
    assert verdict["passed"]
    merged = plain_loss(tmp_path / "merged", "", dtype, rows)
    assert merged == pytest.approx(scores["tuned"]["held_out_loss"], abs=1e-3)


@pytest.mark.long
def test_one_seed_writes_one_journal(material, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    (tmp_path / "real.toml").write_text(recipe_text(material, "stories260K-llama", rows=60, steps=6))
    journals = []
    for name in ("one", "two"):
        assert cli.main(["run", "real.toml", "--output", name]) == 0
        events = RunDir.open(tmp_path / name).metrics.read_text().splitlines()
        journals.append([{k: v for k, v in json.loads(e).items() if not k.endswith("_seconds")} for e in events])
    assert journals[0] == journals[1]
    assert len(journals[0]) > 10
