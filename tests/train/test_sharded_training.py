"""Real ranks over gloo that train on a base in parts: the same, to the bit, as with the whole base at each of them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from made_bases import make_base
from made_ranks import all_well, launch
from test_loop import losses, recipe_for, session_of

from qtune.distributed.ranks import Ranks
from qtune.memory.techniques import Techniques
from qtune.model.adapter import trained_parameters


def train_both(ranks: Ranks, folder: str) -> None:
    whole, parts = (trained(ranks, Path(folder), count) for count in (0, 2))
    assert whole[0] == parts[0]
    assert len(whole[0]) == 2
    assert all(map(torch.equal, whole[1], parts[1]))
    again = trained(ranks, Path(folder), 2, fails_at=40 if ranks.rank == 1 else None)
    assert whole[0] == again[0]
    assert all(map(torch.equal, whole[1], again[1]))


def trained(
    ranks: Ranks, folder: Path, sharded: int, fails_at: int | None = None
) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and adapter of two steps on 5 and 3 packs. Memory runs out in the linear that is `fails_at` in number."""
    train = {"max_steps": 2, "gradient_accumulation": 5, "learning_rate": 1e-3, "eval_every": 1, "optimizer": "adamw"}
    recipe = recipe_for(folder / "llama", {"quantization": "none", "compute_dtype": "float32"}, **train)
    session, events = session_of(recipe, 8)
    engine = session.learner.engine
    engine.ranks = ranks
    engine.switch_to(Techniques(recomputed_layers=2, sharded_layers=sharded))
    calls = [0]

    def count(*given: object) -> None:
        calls[0] += 1
        if calls[0] == fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory")

    for layer in engine.layers:
        layer.mlp.down_proj.register_forward_pre_hook(count)
    dataclasses.replace(session, ranks=ranks).run()
    assert fails_at is None or calls[0] > fails_at
    return losses(events), [weight.detach().clone() for weight in trained_parameters(session.learner.loaded.model)]


@pytest.mark.long  # a whole run of ranks with parts is in tests/test_runs_of_ranks.py
def test_two_ranks_train_on_parts_what_they_train_on_the_whole(tmp_path) -> None:
    make_base(tmp_path / "llama", "llama", num_hidden_layers=2)
    all_well(launch(2, train_both, str(tmp_path)))
