"""lm-eval for real, of rows longer than a window: as plain transformers scores them on the written adapter."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from conforming import proofs, small_models

from qtune.evaluate.benchmarks import Benchmarks
from qtune.model.loaded import Loaded

WINDOWED = ("gemma3_text", "gpt_oss", "llama4_text", "mistral")  # bands, bands with sinks, chunks, all layers
LONG = ("a context that is much longer than any window of eight tokens", " and goes on like this")
ROWS = (LONG, ("short", " one"), ("another of middling length,", " of more than a window"))  # of one padded batch


@pytest.fixture
def own_task(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"context": context, "rest": rest} for context, rest in ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.yaml").write_text(
        f"task: own_rows\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/rows.jsonl\n"
        'test_split: test\noutput_type: loglikelihood\ndoc_to_text: "{{context}}"\ndoc_to_target: "{{rest}}"\n'
        'target_delimiter: ""\nmetric_list:\n  - metric: perplexity\n    aggregation: perplexity\n'
        "    higher_is_better: false\n"
    )
    return folder


def nats_of(model: torch.nn.Module, ids: list[int], context: int) -> float:
    """Of what comes after so many tokens of `context`."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    nats = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    return float(nats[context - 1 :].sum())


@pytest.mark.parametrize("kind", WINDOWED)
def test_rows_beyond_a_window_score_as_in_plain_transformers(kind: str, own_task: Path, tmp_path: Path) -> None:
    small_models.save(kind, tmp_path / "base")
    pair = proofs.tuned_at_once(kind, tmp_path)
    proofs.enlarge(pair)
    tokenizer = small_models.TOKENIZER
    loaded = Loaded(pair.model, tokenizer, "cpu", "float32")
    (scored,) = Benchmarks.open(["own_rows"], own_task).run(loaded, None)
    ids = [[tokenizer(text).input_ids for text in (context, context + rest)] for context, rest in ROWS]
    assert len(ids[0][0]) > 3 * small_models.WINDOW
    wanted = [nats_of(pair.plain, whole, len(context)) for context, whole in ids]
    assert math.log(scored.value) == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)
