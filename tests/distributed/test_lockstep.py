"""Ranks whose passes differ, in real processes over gloo: nobody waits for ever, and all have what one process has."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_models import LAYERS, adapted, assert_equal, base, batch, held_out, on_cpu, one_pass, trained
from made_ranks import all_well, launch
from torch.utils._python_dispatch import TorchDispatchMode

from qtune.distributed.ranks import Ranks
from qtune.errors import RankLost
from qtune.memory.engine import Engine
from qtune.memory.oom_recovery import OpenStep, Recovery
from qtune.memory.techniques import Techniques
from qtune.model.loaded import Loaded

IN_PARTS = Techniques(recomputed_layers=LAYERS, sharded_layers=LAYERS)


def made(ranks: Ranks | None = None) -> tuple[Engine, Loaded]:
    """A model, in parts where there are `ranks`."""
    model = adapted(base("llama", nf4="double"))
    engine = Engine(model, *([ranks] if ranks else []))
    engine.switch_to(IN_PARTS if ranks else Techniques(recomputed_layers=LAYERS))
    return engine, on_cpu(model)


class RunsOut(TorchDispatchMode):
    """Memory runs out in the operation that is number `at`, once."""

    def __init__(self, at: int):
        super().__init__()
        self.operations, self.at = 0, at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if self.operations == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return func(*args, **(kwargs or {}))


def answer(loaded: Loaded, tokens: int) -> torch.Tensor:
    ids = batch((9,), seed=tokens)["input_ids"]
    return loaded.model.eval().generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, use_cache=True)


def step(engine: Engine, loaded: Loaded, batches: list[Any], inside: RunsOut | None = None) -> list[torch.Tensor]:
    """The gradients of a step on `batches`, done again where memory runs out, as training does it."""
    engine.model.train().zero_grad()
    recovery = Recovery(climb=lambda: "nothing", forget_pass=engine.forget_pass)
    opened = OpenStep(recovery, "Step 1", torch.device("cpu"), engine.model.zero_grad)

    def run(piece: dict[str, Any]) -> torch.Tensor:
        nats = engine.model(**piece, fused_loss=True).nats
        nats.backward()
        return nats.detach()

    with loaded.passes_together():
        for each in batches:
            if inside is None:
                opened.add(each, run)
            else:
                with inside:
                    opened.add(each, run)
    return [weight.grad.clone() for weight in trained(engine.model)] if batches else []


def passes_that_differ(ranks: Ranks) -> None:
    engine, ours = made(ranks)
    plain_engine, plain = made()
    rank, batches = ranks.rank, [batch((9,), seed=seed) for seed in range(3)]

    def as_one(act: Callable[..., Any], *given: Any) -> None:
        """`act` gives in parts what it gives of the whole model."""
        assert same(act(engine, ours, *given), act(plain_engine, plain, *given)), given

    as_one(step, batches[:rank])  # nothing, one, two micro-batches
    as_one(step, batches[: 2 - rank % 3])
    as_one(answers, [3, 5][:rank] if rank < 2 else [2])
    as_one(losses, batches[: rank % 2])
    with ours.passes_together():  # one learns while others are asked
        mine = one_pass(ours.model, batches[0]) if rank == 0 else held_out(ours.model, batches[0])
    theirs = one_pass(plain.model, batches[0]) if rank == 0 else held_out(plain.model, batches[0])
    assert_equal(mine, theirs) if rank == 0 else same(mine, theirs)
    whole = RunsOut(at=-1)
    expected = step(plain_engine, plain, batches[:2])
    step(engine, ours, batches[:2], whole)
    for share in (0.05, 0.3, 0.45, 0.55, 0.7, 0.9, 0.98):  # of both passes of both batches
        fails = RunsOut(at=round(share * whole.operations)) if rank == ranks.size - 1 else None
        assert same(step(engine, ours, batches[:2], fails), expected), share
        assert fails is None or fails.operations > whole.operations
    try:
        with ours.passes_together(), RunsOut(at=round(0.3 * whole.operations) if rank == 0 else -1) as inside:
            one_pass(ours.model, batches[0])
        assert rank > 0
    except torch.OutOfMemoryError:
        assert inside.operations == inside.at
    engine.forget_pass()
    ours.model.zero_grad()
    as_one(step, batches)


def answers(engine: Engine, loaded: Loaded, lengths: list[int]) -> list[torch.Tensor]:
    with loaded.passes_together():
        return [answer(loaded, tokens) for tokens in lengths]


def losses(engine: Engine, loaded: Loaded, batches: list[Any]) -> list[float]:
    with loaded.passes_together():
        return [held_out(loaded.model, each) for each in batches]


def same(ours: Any, theirs: Any) -> bool:
    """To the bit."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


def test_passes_that_differ_on_two_ranks() -> None:
    all_well(launch(2, passes_that_differ))


@pytest.mark.long
@pytest.mark.parametrize("size", [3, 4])
def test_passes_that_differ_on_more_ranks(size) -> None:
    all_well(launch(size, passes_that_differ))


def a_rank_that_hangs(ranks: Ranks, folder: str) -> None:
    """Rank 1 stands still in the middle of a pass; the other notes whom it was told of."""
    engine, ours = made(ranks)
    if ranks.rank == 1:
        engine.layers[2].register_forward_pre_hook(lambda *given: time.sleep(60), prepend=True)
    try:
        with ours.passes_together():
            one_pass(ours.model, batch((9,)))
    except RankLost as lost:
        (Path(folder) / "told.json").write_text(json.dumps(str(lost)))
    os._exit(0)


def test_a_rank_that_hangs_in_a_pass_is_named(tmp_path) -> None:
    launched = launch(2, a_rank_that_hangs, str(tmp_path), QTUNE_RANKS_LIMIT="2s")
    launched.processes[0].wait(60)
    os.kill(launched.processes[1].pid, signal.SIGKILL)
    launched.wait(60)
    assert json.loads((tmp_path / "told.json").read_text()).startswith("Rank 1 did not come to where the others wait")
