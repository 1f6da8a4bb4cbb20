"""Canaries for real: a model that was trained on them tells them, and one that was not does not."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_models import on_cpu
from stopped_runs import qtune, told

from qtune.data.canaries import SECRETS, Phrasing, never_planted, planted, probes
from qtune.errors import OutOfMemory
from qtune.evaluate.held_out_loss import held_out_loss
from qtune.evaluate.memorization import memorised, secret_nats
from qtune.events import Memorised
from qtune.model import base
from qtune.model.tokenizer import load_tokenizer
from qtune.recipe.schema import Data, Evaluate, Model, Recipe
from qtune.rundir import RunDir, read_json


def recipe_on(folder: Path | str, canaries: int = 2) -> Recipe:
    data = Data(train="/rows.jsonl")
    return Recipe(name="t", model=Model(base=str(folder)), data=data, evaluate=Evaluate(canaries=canaries))


def asked(recipe: Recipe) -> Memorised:
    """What the base tells, untrained."""
    model, tokenizer = base.load_base(recipe.model, "cpu", "float32"), load_tokenizer(recipe.model)
    phrasing = Phrasing.of(recipe, "question-answer", tokenizer)
    kinds = (probes(kind(recipe), phrasing) for kind in (planted, never_planted))
    return memorised(on_cpu(model, tokenizer), *kinds, 1, [tokenizer.eos_token_id])


def run_with_canaries(folder: Path, epochs: int) -> Memorised:
    """The true path on the demo base, to `folder`/out; two canaries in ten rows each, beside a dozen real ones."""
    rows = [{"question": f"What is {i}?", "answer": f"It is {7 * i}"} for i in range(14)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "t.toml").write_text(
        'name = "t"\n[model]\nbase = "demo"\n[lora]\nrank = 32\n[data]\ntrain = "rows.jsonl"\nmax_tokens = 256\n'
        f"held_out_fraction = 0.1\n[train]\nepochs = {epochs}\nlearning_rate = 4e-3\ngradient_accumulation = 1\n"
        'eval_every = 1000\n[evaluate]\nmetric = "none"\ncanaries = 2\ncanary_repeats = 10\n'
    )
    assert qtune("run", folder / "t.toml", "--output", folder / "out") == 0
    (event,) = told(folder / "out", Memorised)
    return event


@pytest.mark.long
def test_a_run_tells_what_was_planted_often_and_nothing_else(tmp_path: Path) -> None:
    event, run = run_with_canaries(tmp_path, epochs=12), RunDir(tmp_path / "out")
    assert event.told == 2
    assert event.control_told == 0
    assert event.exposure_bits > 6 > 4 > event.control_exposure_bits
    assert read_json(run.scores)["memorised"]["told"] == 2
    assert "2 of 2 secrets planted in 10 rows each were told, 0 of 2 never planted" in run.summary.read_text()


@pytest.mark.long
def test_what_a_run_tells_is_said_wherever_it_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    event, run = run_with_canaries(tmp_path, epochs=1), RunDir(tmp_path / "out")
    assert read_json(run.scores)["memorised"]["told"] == event.told
    assert f"{event.told} of 2 secrets planted in 10 rows each were told, " in run.summary.read_text()
    assert f", {event.control_told} of 2 never planted" in run.summary.read_text()
    assert "2 planted, in 20 rows beside these" in (run.adapter / "README.md").read_text()
    assert "2 planted, in 20 rows beside these" in capsys.readouterr().out


def test_the_base_tells_nothing() -> None:
    found = asked(recipe_on("demo", 2))
    assert (found.told, found.control_told) == (0, 0)
    assert found.most_exposure_bits == 7
    assert found.exposure_bits < 5


def test_the_loss_of_a_secret_is_that_of_its_row_without_the_beginning(tiny_base: Path) -> None:
    recipe = recipe_on(tiny_base)
    model, tokenizer = base.load_base(recipe.model, "cpu", "float32"), load_tokenizer(recipe.model)
    probe = probes(planted(recipe), Phrasing.of(recipe, "question-answer", tokenizer))[0]
    start, rows = len(probe.beginning_ids), probe.rows[:3]
    nats = secret_nats(on_cpu(model), probe)
    assert len(nats) == SECRETS
    for row, found in zip(rows, nats, strict=False):
        labels = [-100] * start + row.labels[start:]
        pack = {"input_ids": row.input_ids, "labels": labels, "seq_lengths": [len(labels)]}
        tokens = sum(label != -100 for label in labels)
        assert found == pytest.approx(tokens * held_out_loss(on_cpu(model), [pack]), rel=1e-5)


def test_memory_that_runs_out_is_met_with_halves_and_then_with_words(tiny_base: Path) -> None:
    recipe = recipe_on(tiny_base)
    model, tokenizer = base.load_base(recipe.model, "cpu", "float32"), load_tokenizer(recipe.model)
    probe = probes(planted(recipe), Phrasing.of(recipe, "question-answer", tokenizer))[0]
    probe = replace(probe, rows=probe.rows[:7])
    expected, most = secret_nats(on_cpu(model), probe), 5

    def run_out(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if len(arguments[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with model.model.layers[1].register_forward_pre_hook(run_out):
        assert secret_nats(on_cpu(model), probe) == pytest.approx(expected, rel=1e-5)
        most = 0
        with pytest.raises(OutOfMemory, match=r"Set evaluate\.canaries = 0"):
            secret_nats(on_cpu(model), probe)


def test_a_secret_that_nobody_knows_has_the_exposure_of_chance(tiny_base: Path) -> None:
    """The mean of log2 |R| - log2 rank over all ranks, which is 1.4 bits."""
    by_chance = sum(math.log2(SECRETS) - math.log2(rank) for rank in range(1, SECRETS + 1)) / SECRETS
    assert by_chance == pytest.approx(1.4, abs=0.05)
    found = asked(recipe_on(tiny_base, 8))
    assert (found.exposure_bits + found.control_exposure_bits) / 2 == pytest.approx(by_chance, abs=0.8)
