"""Every recipe inside qtune loads, plans for a card, and with --demo is ready to train on this machine."""

from pathlib import Path

import pytest

from qtune import ready as readiness
from qtune.hardware import Device
from qtune.model import base
from qtune.plan.planner import decide
from qtune.plan.workload import BatchShape, Work
from qtune.recipe import shipped_recipes
from qtune.recipe.load import load
from qtune.recipe.schema import Model

CARD = Device("cuda:0", "RTX 4060", 8 * 1024**3, 7 * 1024**3, "bfloat16", "a test", 32 * 1024**3, 500 * 1024**2)


@pytest.mark.parametrize("path", shipped_recipes.shipped(), ids=lambda path: path.stem)
def test_it_loads_and_plans(path: Path) -> None:
    """The small base stands in for the one on the hub."""
    config = base.read_config(Model(base="demo"))
    plan = decide(load(path), CARD, config, Work(1000 * (BatchShape.of_one_document(512),)))
    assert plan.steps > 0
    assert plan.compute_dtype == "bfloat16"
    assert plan.fits


QUICK = ("medical", "tools")  # one of questions, one of calls


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.long] * (path.stem not in QUICK), id=path.stem)
        for path in shipped_recipes.shipped()
    ],
)
def test_its_demo_is_ready_to_train(path: Path) -> None:
    ready = readiness.get_ready(load(path, demo=True))
    report = ready.prepared.report
    assert report.train_rows > 0
    assert report.held_out_rows > 0
    assert not report.dropped
    assert report.overlap_rows == 0
    assert report.trained_tokens < report.tokens
