"""Every recipe inside qtune loads, plans for a card, and with --demo is ready to train on this machine."""

from pathlib import Path

import pytest

from qtune import run as story
from qtune.memory.device import Device
from qtune.plan.decide import decide
from qtune.recipe import library
from qtune.recipe.load import load

CARD = Device("cuda:0", "RTX 4060", 8 * 1024**3, 7 * 1024**3, "bfloat16")


@pytest.mark.parametrize("path", library.shipped(), ids=lambda path: path.stem)
def test_it_loads_and_plans(path: Path) -> None:
    plan = decide(load(path), CARD, train_packs=1000)
    assert plan.steps > 0
    assert plan.compute_dtype == "bfloat16"


@pytest.mark.parametrize("path", library.shipped(), ids=lambda path: path.stem)
def test_its_demo_is_ready_to_train(path: Path) -> None:
    ready = story.get_ready(load(path, demo=True))
    report = ready.prepared.report
    assert report.train_rows > 0
    assert report.held_out_rows > 0
    assert not report.dropped
    assert report.overlap_rows == 0
    assert report.trained_tokens < report.tokens
