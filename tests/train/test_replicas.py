"""Real ranks over gloo, each with a share of every step: what they train is what one process trains."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_bases import make_base
from made_ranks import all_well, launch
from test_loop import losses, recipe_for, session_of, weighed

from qtune.distributed.ranks import ALONE, Ranks
from qtune.model.adapter import trained_parameters
from qtune.train import replicas
from qtune.train.replicas import SharedSteps
from qtune.train.trainer import MeteredTrainer

# By name: what of the recipe differs, how many packs, whether documents go apart. The last step of 7 packs has 3.
UNLIKE = "llama on unlike cards"  # the second rank is said to be four times as slow as the first, then measured
WEIGHED = "llama weighed"  # documents count for different things
CASES = {
    "llama": ({"gradient_accumulation": 4}, 7, False),
    "llama clipped in micro-batches": (
        {"micro_batch": 2, "gradient_accumulation": 2, "max_grad_norm": 0.01},
        7,
        False,
    ),
    WEIGHED: ({"gradient_accumulation": 4}, 7, False),
    "llama apart": ({"gradient_accumulation": 4}, 7, True),
    "llama on average": (
        {"gradient_accumulation": 4, "optimizer": "schedule_free_adamw", "lora_plus_ratio": 4.0, "neftune_alpha": 5.0},
        7,
        False,
    ),
    "llama by matrices": ({"gradient_accumulation": 4, "optimizer": "muon", "schedule": "wsd"}, 7, False),
    UNLIKE: ({"gradient_accumulation": 5}, 9, False),
    "qwen3_5_text": ({"gradient_accumulation": 3}, 5, False),
    "qwen3_moe": ({"gradient_accumulation": 2}, 3, False),
}
BASES = {
    "llama": {},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2},
}


QUICK = (WEIGHED, "llama on average", UNLIKE, "qwen3_moe")


def train_each(ranks: Ranks, folder: str, cases: tuple[str, ...]) -> None:
    """Every case, and on the first rank once more by itself."""
    for name in cases:
        kept = trained(ranks, Path(folder), name)
        torch.save(kept, Path(folder, f"{name}-{ranks.rank}.pt"))
        if ranks.is_first:
            torch.save(trained(ALONE, Path(folder), name), Path(folder, f"{name}-alone.pt"))


def trained(ranks: Ranks, folder: Path, name: str) -> dict[str, object]:
    """Losses, the gradient of every step before it is clipped, and the adapter, which hardly moves: of two that differ
    by rounding, gradients differ by more."""
    train, packs, is_apart = CASES[name]
    model = {"quantization": "none", "compute_dtype": "float32"}
    often = {"max_steps": 2, "max_grad_norm": 1e9, "learning_rate": 1e-6, "eval_every": 2, "optimizer": "adamw"}
    recipe = recipe_for(folder / name.split()[0], model, **{**often, **train})
    session, events = session_of(recipe, packs)
    if name == WEIGHED:
        session = replace(session, rows=replace(session.rows, packs=weighed(session.rows.packs)))
    if is_apart:
        session = replace(session, plan=session.plan.with_documents_apart("of a test"))
        session.learner.recovery.pieces = sys.maxsize
    if name == UNLIKE:
        plan, slower = session.plan, 4.0**ranks.rank
        device, speed = replace(plan.device, label=f"card {ranks.rank}"), replace(plan.speed, pack_seconds=slower)
        session = replace(session, plan=replace(plan, device=device, speed=speed))
    shares, ours = [], SharedSteps.ours_of

    def noting_share(self: SharedSteps, rows: list[int], packs: object) -> list[int]:
        shares.append((self.shares.of_ranks, len(ours(self, rows, packs))))
        return ours(self, rows, packs)

    replicas.MEASURED_STEPS, SharedSteps.ours_of = 1, noting_share
    gradients, clip = [], MeteredTrainer._clip_grad_norm

    def noting(trainer: MeteredTrainer, *args: object) -> object:
        parameters = list(trained_parameters(trainer.model))
        gradients.append(torch.cat([weight.grad.flatten() for weight in parameters if weight.grad is not None]).clone())
        return clip(trainer, *args)

    MeteredTrainer._clip_grad_norm = noting
    try:
        replace(session, ranks=ranks).run()
    finally:
        MeteredTrainer._clip_grad_norm, SharedSteps.ours_of = clip, ours
    adapter = [weight.detach().clone() for weight in trained_parameters(session.learner.loaded.model)]
    tokens = [event.tokens for event in events if type(event).__name__ == "StepDone"]
    return {"losses": losses(events), "gradients": gradients, "adapter": adapter, "tokens": tokens, "shares": shares}


@pytest.mark.parametrize(
    ("size", "cases"), [(2, QUICK), *(pytest.param(size, tuple(CASES), marks=pytest.mark.long) for size in (2, 3, 4))]
)
def test_several_ranks_train_what_one_process_would(tmp_path, size, cases) -> None:
    for kind, shape in BASES.items():
        make_base(tmp_path / kind, kind, num_hidden_layers=2, **shape)
    all_well(launch(size, train_each, str(tmp_path), cases))
    for name in cases:
        alone = torch.load(tmp_path / f"{name}-alone.pt")
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(size)]
        assert len(alone["losses"]) == len(alone["gradients"]) == 2
        for each in ranks:
            assert each["losses"] == ranks[0]["losses"], name
            assert each["tokens"] == alone["tokens"], name
            assert all(map(torch.equal, each["adapter"], ranks[0]["adapter"])), name
        assert ranks[0]["losses"] == pytest.approx(alone["losses"], rel=1e-6), name
        for ours, exact in zip(ranks[0]["gradients"], alone["gradients"], strict=True):
            assert (ours - exact).norm() <= 1e-6 * exact.norm(), name
    slow = [each["shares"] for each in map(torch.load, (tmp_path / f"{UNLIKE}-{rank}.pt" for rank in range(size)))]
    for step, told in enumerate(zip(*slow, strict=True)):
        shares = [each for each, _ in told]
        assert shares.count(shares[0]) == size  # all know the same
        assert sum(rows for _, rows in told) == (5, 4)[step]
    begun = [4.0**-rank for rank in range(size)]
    assert slow[0][0][0] == pytest.approx([each / sum(begun) for each in begun])
    is_measured = all(rows for _, rows in (told[0] for told in slow))  # who had no row says nothing of its speed
    assert (slow[0][1][0] != slow[0][0][0]) == is_measured
    assert slow[0][0][1] > slow[1][0][1]
