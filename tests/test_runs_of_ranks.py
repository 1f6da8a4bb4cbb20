"""Runs of two processes, as a launcher starts them: what each writes, how they stop, and that they go on exactly."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from at_a_terminal import AtTerminal
from made_ranks import Ended, Launch
from safetensors.torch import load_file
from stopped_runs import (
    ADAPTER,
    assert_same,
    before_step,
    checkpoints,
    copy,
    held_out_losses,
    qtune,
    send,
    told,
    write_recipe,
)

from qtune import cli
from qtune.events import CheckpointSaved, Evaluated, Notice, RanksStanding, Scored, StepDone
from qtune.model.adapter import trained_parameters
from qtune.train.trainer import MeteredTrainer

TRAIN = {"gradient_accumulation": 3, "log_every": 2}
SAVE = {"every": 1, "keep": 100}
EVALUATE = {"metric": "token_f1", "rows": 3, "max_new_tokens": 4, "general": "none", "canaries": 1}
OF_PAIR = {"data": {"max_rows": 14}, "save": SAVE, "train": TRAIN, "evaluate": EVALUATE}


def ran(*arguments: str | Path, size: int = 2) -> list[Ended]:
    return Launch(size, ["-m", "qtune", *map(str, arguments)], env={"QTUNE_RANKS_LIMIT": "60s"}).wait()


@pytest.fixture(scope="module")
def pair(tiny_base, tmp_path_factory) -> tuple[Path, list[Ended]]:
    """A run of two ranks with dropout; an epoch is three steps of three rows, and one of two."""
    folder = tmp_path_factory.mktemp("pair")
    recipe = write_recipe(folder, tiny_base, **OF_PAIR)
    return folder / "run", ran("run", recipe, "--output", folder / "run")


def test_the_first_rank_writes_and_draws_and_the_others_keep_their_own(pair) -> None:
    run, (first, second) = pair
    assert (first.returncode, second.returncode) == (0, 0), first.out + second.out
    assert "right answers" in first.out or "score" in first.out or "token F1" in first.out
    assert second.out == ""
    own = run / "ranks" / "0001"
    assert {path.name for path in own.iterdir()} >= {"metrics.jsonl", "memory.jsonl", "log.txt", "plan.json"}
    assert not {path.name for path in own.iterdir()} & {"adapter", "checkpoints", "scores.json", "summary.md"}
    assert {"adapter", "checkpoints", "scores.json", "summary.md"} <= {path.name for path in run.iterdir()}


def test_all_ranks_know_the_same_losses_and_scores(pair) -> None:
    run, _ = pair
    own = run / "ranks" / "0001"
    assert [event.loss for event in told(own, StepDone)] == [event.loss for event in told(run, StepDone)]
    scores = [[(event.loss, event.score, event.rows) for event in told(each, Scored)] for each in (run, own)]
    assert scores[0] == scores[1]
    assert [rows for *_, rows in scores[0]] == [3, 3]
    assert told(own, CheckpointSaved) == []


def test_a_base_of_which_each_has_a_part_is_the_same_run(pair, tiny_base, tmp_path) -> None:
    """Three packs a step, three rows: one rank has always less to do. It is probed and rehearsed, too."""
    recipe = write_recipe(tmp_path, tiny_base, **OF_PAIR, memory={"shard_layers": 2, "rehearse": True})
    first, second = ran("run", recipe, "--output", tmp_path / "run")
    assert (first.returncode, second.returncode) == (0, 0), first.out + second.out
    planned = json.loads((tmp_path / "run" / "plan.json").read_text())["techniques"]
    assert planned["sharded_layers"] == 2
    for kind in (StepDone, Scored):
        ours, theirs = ([event.loss for event in told(run, kind)] for run in (tmp_path / "run", pair[0]))
        assert ours == theirs
    saved = [run / "adapter" / "adapter_model.safetensors" for run in (tmp_path / "run", pair[0])]
    assert saved[0].read_bytes() == saved[1].read_bytes()


@pytest.mark.long
def test_an_adapter_that_begins_by_rows_is_the_same_on_every_rank_with_layers_in_parts(tiny_base, tmp_path) -> None:
    lora, train = {"init": "eva", "rank": 4, "dropout": 0.0}, {**TRAIN, "max_steps": 2}
    adapters = []
    for layers in (0, 2):
        (folder := tmp_path / str(layers)).mkdir()
        changes = {**OF_PAIR, "lora": lora, "train": train, "memory": {"shard_layers": layers}}
        recipe = write_recipe(folder, tiny_base, **changes)
        first, second = ran("run", recipe, "--output", folder / "run")
        assert (first.returncode, second.returncode) == (0, 0), first.out + second.out
        losses = [[event.loss for event in told(folder / each, StepDone)] for each in ("run", "run/ranks/0001")]
        assert losses[0] == losses[1]
        adapters.append((folder / "run" / ADAPTER).read_bytes())
    assert adapters[0] == adapters[1]


@pytest.mark.long
def test_weights_that_a_rank_has_not_cannot_begin_an_adapter(tiny_base, tmp_path) -> None:
    changes = {**OF_PAIR, "lora": {"init": "loftq", "rank": 4}, "memory": {"shard_layers": 2}}
    recipe = write_recipe(tmp_path, tiny_base, **changes)
    first, second = ran("run", recipe, "--output", tmp_path / "run")
    assert first.returncode == second.returncode == 2
    assert 'lora.init = "loftq" reads every weight of the base' in first.out
    assert not (tmp_path / "run").exists()


def test_each_log_line_has_the_memory_and_the_waiting_of_every_rank(pair) -> None:
    run, (first, _) = pair
    standing = told(run, RanksStanding)
    assert [event.step for event in standing] == [event.step for event in told(run, StepDone)]
    assert all(len(event.peak_bytes) == len(event.waited_seconds) == 2 for event in standing)
    assert all(min(event.peak_bytes) > 0 <= min(event.waited_seconds) for event in standing)
    assert max(max(event.waited_seconds) for event in standing) > 0
    assert "  ranks " in first.out


def test_going_on_with_as_many_ranks_is_exact(pair, tmp_path) -> None:
    """Dropout included: the numbers of the second rank follow from seed, step and rank, in no checkpoint."""
    run = copy(pair[0], tmp_path / "run", up_to=3)
    first, second = ran("resume", run)
    assert (first.returncode, second.returncode) == (0, 0), first.out + second.out
    assert_same(run, pair[0])


def in_each(act: Callable[..., object], run: Path, *given: object) -> list[Ended]:
    """How two ranks ended that went on with `run` in `act(run, *given)`, a function of this file."""
    here = Path(__file__).parent
    code = f"import sys; sys.path[:0] = {[str(here), str(here / 'support')]}\n"
    code += f"from {Path(__file__).stem} import *; {act.__name__}({', '.join(map(repr, (str(run), *given)))})"
    return Launch(2, ["-c", code], env={"QTUNE_RANKS_LIMIT": "60s"}).wait()


def stop_before(run: str, step: int) -> None:
    """The second rank alone is sent a signal before that step."""
    signalled = send(signal.SIGTERM) if os.environ["RANK"] == "1" else lambda: None
    with before_step(step, signalled):
        sys.exit(cli.main(["resume", run]))


def test_a_signal_to_one_rank_ends_all_after_the_same_step(pair, tmp_path) -> None:
    run = copy(pair[0], tmp_path / "run", up_to=2)
    ended = in_each(stop_before, run, 4)
    assert [each.returncode for each in ended] == [143, 143], ended
    assert checkpoints(run) == [1, 2, 3, 4]
    saved = [path / "checkpoints" / "step-00000004" / ADAPTER for path in (run, pair[0])]
    assert saved[0].read_bytes() == saved[1].read_bytes()


@contextlib.contextmanager
def out_of_memory(function: str, calls: range) -> Iterator[None]:
    """Memory runs out in `calls`, by number, of whatever `function` asks torch.empty_like for."""
    empty_like, made = torch.empty_like, [0]

    def refusing(*args: object, **kwargs: object) -> torch.Tensor:
        if sys._getframe(1).f_code.co_name == function:
            made[0] += 1
            if made[0] in calls:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return empty_like(*args, **kwargs)

    torch.empty_like = refusing
    try:
        yield
    finally:
        torch.empty_like = empty_like


def run_out_of_memory(run: str, times: int) -> None:
    """The second rank alone does, in its share of a step and, `times`, as gradients are added up in the step after."""
    compute, passes = MeteredTrainer.compute_loss, []

    def computing(trainer: MeteredTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        loss = compute(trainer, *args, **kwargs)
        passes.append(trainer.step_under_way)
        if len(passes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss

    if os.environ["RANK"] == "0":
        sys.exit(cli.main(["resume", run]))
    MeteredTrainer.compute_loss = computing
    with out_of_memory("summed", range(2, 2 + times)):
        sys.exit(cli.main(["resume", run]))


@pytest.mark.long
def test_memory_that_runs_out_on_one_rank_changes_nothing(pair, tmp_path) -> None:
    """In a pass and in the sum over all ranks, whose gradients it needs anew."""
    run = copy(pair[0], tmp_path / "run", up_to=6)
    ended = in_each(run_out_of_memory, run, 1)
    assert [each.returncode for each in ended] == [0, 0], ended
    said = [event.text for event in told(run / "ranks" / "0001", Notice) if "ran out of memory" in event.text]
    assert [text.partition(" ran")[0] for text in said] == ["Step 7"]
    assert_same(run, pair[0])


@pytest.mark.long  # that one rank's failure is told once is seen below
def test_memory_that_is_not_to_be_had_on_one_rank_ends_all_with_a_checkpoint(pair, tmp_path) -> None:
    run = copy(pair[0], tmp_path / "run", up_to=6)
    first, second = in_each(run_out_of_memory, run, 100)
    assert (first.returncode, second.returncode) == (1, 1)
    assert "Rank 1: Step 8 ran out of memory between its passes" in first.out
    assert "ran out of memory between" not in second.out
    assert checkpoints(run)[-1] == 7


def differ_from(run: str, step: int) -> None:
    """The second rank's adapter is another from that step on, by one bit of one weight."""
    get_batches = MeteredTrainer.get_batch_samples

    def disturbing(trainer: MeteredTrainer, *args: object) -> object:
        if trainer.state.global_step == step - 1 and trainer.shared.ranks.rank == 1:
            weight = next(iter(trained_parameters(trainer.model)))
            weight.data.view(-1).view(torch.int32)[0] ^= 1
        return get_batches(trainer, *args)

    MeteredTrainer.get_batch_samples = disturbing
    sys.exit(cli.main(["resume", run]))


def test_ranks_whose_adapters_differ_are_told_at_the_next_checkpoint(pair, tmp_path) -> None:
    run = copy(pair[0], tmp_path / "run", up_to=6)
    first, second = in_each(differ_from, run, 7)
    assert (first.returncode, second.returncode) == (1, 1)
    assert "Step 7: the adapter of rank 1 is not that of rank 0 to the bit" in first.out
    assert "not that of rank 0" not in second.out
    assert checkpoints(run)[-1] == 6


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="a terminal of its own")
def test_ctrl_c_at_a_terminal_ends_all_ranks_with_a_checkpoint(tiny_base, tmp_path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, data={"max_rows": 14}, train={**TRAIN, "epochs": 200}, save=SAVE)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "qtune", "run", recipe, "--output", run, "--cards", "2"]
    terminal = AtTerminal(command, tmp_path, is_forked=True, QTUNE_RANKS_LIMIT="60s")
    try:
        until, printed = time.monotonic() + 60, b""
        while not any(run.glob("checkpoints/step-*")):
            assert time.monotonic() < until, printed
            time.sleep(0.05)
        terminal.type("\x03")
        while chunk := terminal.read():
            printed += chunk
        assert terminal.process.wait(timeout=10) == 130, printed
        with pytest.raises(ProcessLookupError):
            os.killpg(terminal.process.pid, 0)
    finally:
        terminal.close()
    steps = [event.step for event in told(run, CheckpointSaved)]
    assert steps == list(range(1, steps[-1] + 1))
    assert steps[-1] < 800
    assert checkpoints(run)[-1] == steps[-1]
    assert b"qtune resume" in printed
    assert printed.count(b"Ctrl-C: ") <= 1


LOSSES_OF_BEST = (3.0, 2.0, 4.0, 2.5)  # after every second step of eight: the fourth has the best


def act_with_losses(path: str, verb: str, output: str) -> None:
    """`qtune run` or `qtune resume` as a rank, with held-out losses that are said; one into `stopped` is, at step 6."""
    known = len(told(Path(path), Evaluated)) if verb == "resume" else 0
    stop = before_step(6, send(signal.SIGTERM)) if output.endswith("stopped") else contextlib.nullcontext()
    with held_out_losses(*LOSSES_OF_BEST[known:]), stop:
        sys.exit(cli.main([verb, path, *(["--output", output] if verb == "run" else [])]))


@pytest.mark.long
def test_the_best_of_two_ranks_is_the_result_after_a_stop_too(tiny_base, tmp_path) -> None:
    """All ranks score the adapter of the best step, and not that of the last."""
    train = {**TRAIN, "eval_every": 2}
    of_best = {**OF_PAIR, "save": {"every": 100, "keep": 1, "result": "best"}, "train": train}
    recipe = write_recipe(tmp_path, tiny_base, **of_best)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert [each.returncode for each in in_each(act_with_losses, recipe, "run", str(whole))] == [0, 0]
    best, last = (load_file(whole / "checkpoints" / f"step-{step:08}" / ADAPTER) for step in (4, 8))
    weights = load_file(whole / ADAPTER)
    assert all(torch.equal(weights[name], best[name]) for name in best)
    assert not all(torch.equal(weights[name], last[name]) for name in last)
    scores = [[event.loss for event in told(each, Scored)] for each in (whole, whole / "ranks" / "0001")]
    assert scores[0] == scores[1]
    assert [each.returncode for each in in_each(act_with_losses, recipe, "run", str(stopped))] == [143, 143]
    assert [each.returncode for each in in_each(act_with_losses, stopped, "resume", "")] == [0, 0]
    assert_same(stopped, whole)


@pytest.mark.long
def test_going_on_with_another_number_of_ranks_trains_the_same_rows_to_the_same_loss(tiny_base, tmp_path) -> None:
    model = {"base": str(tiny_base), "quantization": "none", "compute_dtype": "float32"}
    changes = {"data": {"max_rows": 14}, "save": SAVE, "train": {**TRAIN, "log_every": 1}, "lora": {"dropout": 0.0}}
    recipe = write_recipe(tmp_path, tiny_base, model=model, **changes)
    assert qtune("run", recipe, "--output", tmp_path / "alone") == 0
    alone = tmp_path / "alone"
    exact = [event.loss for event in told(alone, StepDone)]
    run = copy(alone, tmp_path / "run", up_to=3)
    for size, up_to in ((2, 6), (3, 5), (1, 4)):
        ended = ran("resume", run, size=size) if size > 1 else [Ended(qtune("resume", run), "")]
        assert [each.returncode for each in ended] == [0] * size, ended
        assert [event.loss for event in told(run, StepDone)] == pytest.approx(exact, rel=1e-4)
        run = copy(run, tmp_path / f"run-{size}", up_to=up_to)


def test_a_rank_that_fails_is_told_of_once_and_ends_all(tiny_base, tmp_path) -> None:
    recipe = write_recipe(tmp_path, tiny_base)
    code = """
import os, sys
from qtune import cli, hardware, ready
from qtune.errors import MachineError
def fails():
    raise MachineError("This card is asleep.")
if os.environ["RANK"] == "1":
    ready.find_device = fails
sys.exit(cli.main(["run", sys.argv[1], "--output", sys.argv[2]]))
"""
    first, second = Launch(2, ["-c", code, str(recipe), str(tmp_path / "run")]).wait()
    assert (first.returncode, second.returncode) == (2, 2)
    assert "Rank 1: This card is asleep." in first.out
    assert "asleep" not in second.out
