"""A run from its recipe to a merged model, by the command line, on a card and on the processor."""

import gc
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import card
import pytest
import torch
from card import memory
from conftest import byte_tokenizer, tiny_config
from stopped_runs import assert_same, copy, qtune, told, write_recipe
from transformers import LlamaForCausalLM

from qtune import ready
from qtune.events import Notice, Rehearsed, StepDone
from qtune.hardware import Device
from qtune.merge import greedy_answers
from qtune.plan.plan import Plan
from qtune.plan.planner import decide
from qtune.recipe.schema import Recipe
from qtune.train.trainer import MeteredTrainer

LAYERS = 3
RECIPE: dict[str, dict[str, Any]] = {
    "memory": {"embedding": "host", "head": "host", "stream_layers": LAYERS},
    "lora": {"rank": 4, "alpha": 64, "dropout": 0.0, "targets": "all-linear"},
    "data": {"train": "rows.jsonl", "held_out_fraction": 0.2, "max_tokens": 128, "packing": True},
    "train": {"max_steps": 3, "gradient_accumulation": 2, "learning_rate": 3e-3, "eval_every": 2},
    "save": {"every": 1},
    "evaluate": {"metric": "token_f1", "rows": 3, "max_new_tokens": 4, "samples": 2, "general": "none"},
}
UNSCORED = {"metric": "none", "general": "none"}


def run_qtune(*arguments: str | Path) -> None:
    """What was held before is given back, or this would be told to hold it."""
    gc.collect()
    assert qtune(*arguments) == 0


@pytest.fixture(scope="module", autouse=True)
def plans_made_once() -> Iterator[None]:
    """A plan takes longer than all else, and those of these runs differ in nothing that is looked at."""
    plans: list[Plan] = []

    def decide_once(recipe: Recipe, device: Device, *others: Any, **named: Any) -> Plan:
        if not plans:
            plans.append(decide(recipe, device, *others, **named))
        return replace(plans[0], device=device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ready, "decide", decide_once)
        yield


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy_answers, "ANSWER_TOKENS", 6)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(num_hidden_layers=LAYERS)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def before_passes() -> list[set[str]]:
    """Of every step that a card takes, the parameters in host memory as it begins."""
    return []


def noting(seen: list[set[str]]) -> Callable[..., Any]:
    get_batches = MeteredTrainer.get_batch_samples

    def note(self: MeteredTrainer, *args: Any, **kwargs: Any) -> Any:
        seen.append({name for name, weight in self.model.named_parameters() if weight.device.type == "cpu"})
        return get_batches(self, *args, **kwargs)

    return note


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory, before_passes: list[set[str]]) -> Path:
    """Folder of one recipe's runs, each named after where it was."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = write_recipe(folder, base, **RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeteredTrainer, "get_batch_samples", noting(before_passes))
        run_qtune("run", recipe, "--output", folder / "card")
    with card.switched_off():
        run_qtune("run", recipe, "--output", folder / "cpu")
    return folder


def test_it_is_the_run_of_the_processor(runs: Path) -> None:
    assert_same(runs / "card", runs / "cpu")
    scores, theirs = (json.loads((runs / place / "scores.json").read_text()) for place in ("card", "cpu"))
    assert scores == theirs


def test_what_is_on_the_host_stays_there(runs: Path, before_passes: list[set[str]]) -> None:
    """accelerate moved all of it to the card before the first step, and a lookup of rows met a table there."""
    assert len(before_passes) == 3
    for on_host in before_passes:
        assert {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"} <= on_host
        assert sum("self_attn.q_proj" in name for name in on_host) in (LAYERS - 2, LAYERS - 1)  # slots hold two


def test_the_largest_step_takes_what_was_forecast(runs: Path) -> None:
    """But for what cuBLAS holds: this card's products need no workspace."""
    found = told(runs / "card", Rehearsed)[0]
    parts = json.loads((runs / "card" / "plan.json").read_text())["forecast"]["device"]
    assert found.measured_bytes == pytest.approx(found.forecast_bytes - parts["matmul workspaces"], rel=0.01)


def test_it_goes_on_where_it_was_stopped(runs: Path, tmp_path: Path) -> None:
    stopped = copy(runs / "card", tmp_path / "stopped", up_to=1)
    run_qtune("resume", stopped)
    assert_same(stopped, runs / "card")


def test_it_answers_scores_and_merges_as_on_the_processor(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`generate` sent what it began with to the host, as that is where the first parameter is."""

    def outcome(name: str) -> tuple[str, bytes]:
        merged = tmp_path / name
        run_qtune("merge", runs / name, "--output", merged)
        run_qtune("eval", runs / name, "--merged", merged)
        capsys.readouterr()
        run_qtune("chat", runs / name, "--prompt", "what is xx?", "--max-new-tokens", "8")
        return capsys.readouterr().out, (merged / "model.safetensors").read_bytes()

    on_card = outcome("card")
    with card.switched_off():
        assert outcome("cpu") == on_card


def test_a_base_in_16_bits_is_not_moved_either(base: Path, tmp_path: Path) -> None:
    """transformers moved one that is not quantised as soon as a trainer was made."""
    recipe = write_recipe(tmp_path, base, **{**RECIPE, "evaluate": UNSCORED}, model={"quantization": "none"})
    run_qtune("run", recipe, "--output", tmp_path / "run")


def test_a_step_that_runs_out_is_done_again(base: Path, runs: Path, tmp_path: Path) -> None:
    """Another process takes all but a little for a moment; and then a library of the card's finds no memory, what the
    runtime remembers of which would end this process at the next kernel of bitsandbytes."""
    recipe = write_recipe(tmp_path, base, **{**RECIPE, "evaluate": UNSCORED})
    whole, loss_of = memory.total, MeteredTrainer.compute_loss
    in_second, in_third = itertools.count(), itertools.count()

    def run_out(self: MeteredTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1 and next(in_second) == 0:
            memory.total = memory.allocated + 64 * 1024
        if self.state.global_step == 2 and next(in_third) == 0:
            memory.has_error = True
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return loss_of(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeteredTrainer, "compute_loss", run_out)
        patch.setattr(torch.card, "empty_cache", lambda: setattr(memory, "total", whole))
        run_qtune("run", recipe, "--output", tmp_path / "run")
    assert sum("ran out of memory" in notice.text for notice in told(tmp_path / "run", Notice)) == 2
    ours, theirs = ([step.loss for step in told(run, StepDone)] for run in (tmp_path / "run", runs / "card"))
    assert ours == pytest.approx(theirs, rel=1e-3)
