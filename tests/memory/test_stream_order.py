"""Copies beside arithmetic are ordered: no story has a race, and none of the waits can be taken away unnoticed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import pytest
import torch
from made_models import LAYERS, adapted, base, batch, forward, held_out
from stream_clocks import (
    ALL_WAIT,
    ARITHMETIC_WAITS,
    COPY_WAITS,
    HOST_WAITS,
    PAGEABLE,
    PAGED,
    StreamClocks,
    run_with_clocks,
)

from qtune.events import Event
from qtune.memory import embedding_offload, output_head
from qtune.memory.engine import Engine
from qtune.memory.oom_recovery import OpenStep, Recovery
from qtune.memory.techniques import Techniques
from qtune.train.atomic_step import keep_steps_whole
from qtune.train.optimizer_state import put_optimizer_back, take_optimizer

Site = tuple[str, str]

EVERYTHING = Techniques(
    recomputed_layers=LAYERS, host_checkpoints=True, streamed_layers=3, head="host", host_embedding=True
)
SETS = {
    "offloaded": Techniques(recomputed_layers=LAYERS, host_checkpoints=True),
    "offloaded in part": Techniques(recomputed_layers=2, host_checkpoints=True),
    "streamed": Techniques(recomputed_layers=LAYERS, streamed_layers=LAYERS),
    "one streamed": Techniques(recomputed_layers=LAYERS, streamed_layers=1),
    "two streamed, offloaded": Techniques(recomputed_layers=LAYERS, host_checkpoints=True, streamed_layers=2),
    "in tiles and groups": EVERYTHING.having(tile_tokens=8, head_groups=2),
    "embedding and head": Techniques(head="host", host_embedding=True),
}


@pytest.fixture(autouse=True)
def many_slices_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the head, and of the embedding's rows: of the tiny models' there would be one."""
    monkeypatch.setattr(output_head, "HOST_SLICE_BYTES", 60 * 64 * 4)  # of 262 rows
    monkeypatch.setattr(embedding_offload, "STAGING_BYTES", 2 * 8 * 64 * 4)  # 8 rows at a time


@dataclass
class Live:
    """A tiny model with some techniques, and what can happen to it."""

    engine: Engine

    @classmethod
    def of(cls, clocks: StreamClocks, techniques: Techniques, nf4: str | None = None) -> "Live":
        engine = Engine(adapted(base("llama", nf4=nf4)))
        engine.switch_to(techniques)
        if techniques.host_embedding:
            clocks.in_host_memory(engine.causal.get_input_embeddings().weight, PAGEABLE)
        return cls(engine)

    def step(self, *lengths: int) -> None:
        forward(self.engine.model.train(), batch(lengths)).backward()
        self.engine.model.zero_grad()

    def held_out(self) -> None:
        held_out(self.engine.model, batch((11,)))

    def answer(self) -> None:
        prompt = batch((6,))["input_ids"]
        self.engine.model.eval().generate(input_ids=prompt, max_new_tokens=2, do_sample=False, use_cache=True)

    def out_of_memory_and_again(self, clocks: StreamClocks, after: int, *lengths: int) -> None:
        """Memory runs out `after` so many operations of a pass; the batch is run again, as training does."""
        told: list[Event] = []
        recovery = Recovery(told.append, lambda: "nothing", self.engine.forget_pass)

        def run(piece: dict[str, Any]) -> torch.Tensor:
            nats = forward(self.engine.model.train(), piece)
            nats.backward()
            return nats.detach()

        step = OpenStep(recovery, "Step 1", torch.device("cpu"), self.engine.model.zero_grad)
        rows = batch(lengths)
        clocks.fails_at = clocks.operations + after
        step.add(rows, run)
        assert len(told) == 1
        self.engine.model.zero_grad()


def training(clocks: StreamClocks, techniques: Techniques = EVERYTHING, nf4: str | None = None) -> None:
    """Steps that grow and shrink, an evaluation between them."""
    live = Live.of(clocks, techniques, nf4)
    live.step(9, 4)
    live.held_out()
    live.step(12, 9)
    live.step(7)


def recovering(clocks: StreamClocks) -> None:
    """Memory runs out here and there, in batches that grow."""
    live = Live.of(clocks, EVERYTHING)
    before = clocks.operations
    live.step(9)
    operations = clocks.operations - before
    for tokens, share in ((14, 0.15), (16, 0.3), (18, 0.4), (20, 0.6), (22, 0.8)):
        live.out_of_memory_and_again(clocks, round(share * operations), tokens)
    live.step(9)


def answering(clocks: StreamClocks) -> None:
    """A model that is dropped as soon as it has answered."""
    live = Live.of(clocks, Techniques(streamed_layers=3, host_embedding=True, head="host"))
    live.answer()
    live.held_out()


def optimizing(clocks: StreamClocks) -> None:
    """Steps of an optimizer whose state is paged, one of which fails half-way; a checkpoint of it, put back."""
    weights = {torch.nn.Parameter(torch.ones(64, 64)): name for name in ("up", "down")}
    optimizer = bitsandbytes.optim.AdamW8bit(weights, lr=0.1)
    fails, update = [5], optimizer.update_step
    keep_steps_whole(optimizer, Recovery(), lambda: "Step 1")

    def failing(*args: Any) -> None:
        fails[0] -= 1
        if fails[0] == 0:
            raise RuntimeError("CUDA out of memory")
        update(*args)
        for state in map(optimizer.state[args[1]].get, ("state1", "state2")):
            if clocks.use_of(state).place != PAGED:
                written = clocks.use_of(state).write
                clocks.in_host_memory(state, PAGED)
                clocks.use_of(state).write = written

    optimizer.update_step = failing
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert fails[0] < 0
    tensors, others = take_optimizer(optimizer, weights)
    checkpoint = {name: tensor.clone() for name, tensor in tensors.items()}
    assert {clocks.use_of(tensor).place for tensor in checkpoint.values()} == {PAGEABLE}
    put_optimizer_back(optimizer, weights, checkpoint, others)


SITES: dict[Site, Callable[[StreamClocks], None]] = {
    ("WholeHome.visit", COPY_WAITS): training,
    ("LayerStream.bring_in", ARITHMETIC_WAITS): training,
    ("HostBuffers.putting", COPY_WAITS): training,
    ("HostBuffers.putting", ARITHMETIC_WAITS): training,
    ("HostBuffers._fetch", COPY_WAITS): training,
    ("HostBuffers.get", ARITHMETIC_WAITS): training,
    ("_copied_ahead", COPY_WAITS): training,
    ("_copied_ahead", ARITHMETIC_WAITS): training,
    ("RowsToDevice.send", COPY_WAITS): training,
    ("RowsToDevice.send", ARITHMETIC_WAITS): training,
    ("RowsToDevice.send", HOST_WAITS): training,
    ("HostCopy.take", ALL_WAIT): optimizing,
    ("HostCopy.put_back", ALL_WAIT): optimizing,
    ("put_optimizer_back", ALL_WAIT): optimizing,
    ("Copy.__del__", ARITHMETIC_WAITS): recovering,
    ("_at_rest", ALL_WAIT): answering,
}


@pytest.mark.parametrize("techniques", SETS)
def test_no_race_in_training(techniques: str) -> None:
    assert run_with_clocks(lambda clocks: training(clocks, SETS[techniques])).races == []


def test_no_race_in_training_on_four_bits() -> None:
    """Scales, and scales of scales, are streamed too."""
    assert run_with_clocks(lambda clocks: training(clocks, EVERYTHING, "double")).races == []


def test_no_race_and_every_wait_is_listed() -> None:
    waited: set[Site] = set()
    for story in (training, recovering, answering, optimizing):
        clocks = run_with_clocks(story)
        assert clocks.races == [], story.__name__
        waited |= clocks.waits.keys()
    assert waited == SITES.keys()


@pytest.mark.long
def test_no_race_wherever_memory_runs_out() -> None:
    """Also in the middle of a copy: at every 60th of 2,200 operations."""

    def story(clocks: StreamClocks) -> None:
        live = Live.of(clocks, EVERYTHING)
        before = clocks.operations
        live.step(9)
        for number, after in enumerate(range(1, clocks.operations - before, 60)):
            live.out_of_memory_and_again(clocks, after, 10 + number)

    assert run_with_clocks(story).races == []


@pytest.mark.parametrize("site", SITES, ids=" ".join)
def test_a_wait_taken_away_alone_is_noticed(site: Site) -> None:
    assert run_with_clocks(SITES[site], without=site).races
