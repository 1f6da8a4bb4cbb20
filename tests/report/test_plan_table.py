"""The forecast as a person reads it, at the widths people have."""

import io
from dataclasses import asdict, replace
from typing import Any

import pytest
from rich.console import Console, RenderableType

from qtune.hardware import Device
from qtune.memory.techniques import Techniques
from qtune.plan.forecast import Forecast
from qtune.plan.ladder import Budget
from qtune.plan.plan import Plan
from qtune.plan.rung_report import Rung
from qtune.plan.throughput import Speed
from qtune.report import plan_table

GIB, MIB = 1024**3, 1024**2
PLAN = Plan(
    device=Device("cuda:0", "RTX 4060", 8 * GIB, 7 * GIB, "bfloat16"),
    compute_dtype="bfloat16",
    steps=500,
    warmup_steps=15,
    eval_every=50,
    micro_batch=1,
    gradient_accumulation=8,
    is_assumed=False,
    fits=True,
    layers=32,
    techniques=Techniques(32, True),
    budget=Budget(7 * GIB, 20 * GIB),
    forecast=Forecast(
        {
            "base": 3400 * MIB,
            "head": 1000 * MIB,
            "layer workspace": 700 * MIB,
            "slack": 200 * MIB,
            "context": 500 * MIB,
        },
        {"checkpoints": 512 * MIB, "undo copy of the adapter": 160 * MIB},
        "backward last",
        {"forward": 5 * GIB, "backward last": 5 * GIB},
        4 * GIB,
    ),
    rungs=(
        Rung("recompute layers, 32 of 32", "keep_layers", True, 11 * GIB, 0, 0.5, "made again in the backward pass"),
        Rung("checkpoints in host memory", "checkpoints", True, 480 * MIB, 512 * MIB, 0.03, "on a stream of their own"),
        Rung("output head in NF4", "head", False, 0, 0, 0.0, "refused: its head caps the logits"),
        Rung("streamed layers, 32 of 32", "stream_layers", False, 3 * GIB, 3300 * MIB, 0.1, "copied in ahead"),
        Rung("heads in groups, 8", "head_groups", False, -3, 0, 0.1, "attention runs once more"),
    ),
    reserve=(),
    speed=Speed(1500.0, 10.9, 5450.0, 0.53),
    disk_bytes=230 * MIB,
    remedies=(),
    choices=(),
)


def shown(renderable: RenderableType, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def plan_json(**changes: Any) -> dict[str, Any]:
    return asdict(replace(PLAN, **changes))


def test_the_whole_table_at_120() -> None:
    assert (
        shown(plan_table.forecast_table(plan_json()), 120)
        == """
fits   5.7 GiB of 7.0 GiB on RTX 4060, 1.3 GiB to spare; 672 MiB of 20 GiB host memory

at the peak, in the backward pass of the last layers     device                               host
base                                                    3.3 GiB  ████████████████████████
head                                                  1,000 MiB  ███████
checkpoints                                                                                512 MiB
layer workspace                                         700 MiB  █████
slack                                                   200 MiB  █
context                                                 500 MiB  ████
undo copy of the adapter                                                                   160 MiB
in all                                                  5.7 GiB                            672 MiB

technique                       frees      host     time
● recompute layers, 32 of 32   11 GiB            +50.0 %  made again in the backward pass
● checkpoints in host memory  480 MiB  +512 MiB   +3.0 %  on a stream of their own
○ output head in NF4                                      refused: its head caps the logits
○ streamed layers, 32 of 32   3.0 GiB  +3.2 GiB  +10.0 %  copied in ahead
○ heads in groups, 8          nothing            +10.0 %  attention runs once more

batch   1 x 8 sequences a step
time    about 1,500 tokens/s, 11 s a step, 1 h 30 min for 500 steps; the techniques add about 53.0 %
disk    230 MiB for adapter and checkpoints"""
    )


@pytest.mark.parametrize("width", [60, 80, 120])
def test_nothing_is_cut_off(width: int) -> None:
    text = shown(plan_table.forecast_table(plan_json()), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    for word in ("5.7 GiB", "recompute", "refused:", "nothing", "tokens/s", "230 MiB"):
        assert word in text


def test_what_nobody_asked_about_is_left_empty() -> None:
    """It would read as a technique that frees nothing."""
    unasked = Rung("heads in groups, 8", "head_groups", False, None, None, 0.1, "attention runs once more")
    text = shown(plan_table.forecast_table(plan_json(rungs=(unasked,))), 100)
    assert "nothing" not in text
    assert "+10.0 %" in text


def test_what_does_not_fit_is_not_said_to_have_room() -> None:
    """Within the budget, but not within what is kept free of it."""
    text = shown(plan_table.forecast_table(plan_json(fits=False, budget=Budget(round(5.8 * GIB), 20 * GIB))), 100)
    assert "does not fit   5.7 GiB of 5.8 GiB on RTX 4060;" in text
    assert "to spare" not in text


def test_unread_data_and_an_unknown_card_are_said_to_be_so() -> None:
    text = shown(plan_table.forecast_table(plan_json(is_assumed=True, speed=Speed(None, None, None, 0.5))), 100)
    assert "not known for a card that is not here" in text
    assert "not read: every sequence is taken to be full" in text
    assert "500 steps" not in text


def test_a_part_of_another_name_is_shown_all_the_same() -> None:
    found = replace(PLAN.forecast, device={"base": GIB, "something new": 2 * GIB})
    assert "something new" in shown(plan_table.forecast_table(plan_json(forecast=found)), 80)


def test_the_longest_contexts_and_the_base_on_one_line() -> None:
    """The name was once a title as narrow as the table, a letter or two a line."""
    rows = [
        {"device_bytes": 6 * GIB, "host_bytes": 51 * GIB, "tokens": 0, "bound": "card"},
        {"device_bytes": 12 * GIB, "host_bytes": 51 * GIB, "tokens": 67_840, "bound": "host"},
        {"device_bytes": 24 * GIB, "host_bytes": 51 * GIB, "tokens": 123_456, "bound": "both"},
    ]
    assert (
        shown(plan_table.longest_table("/a/rather/long/folder/of/a/base", rows), 80)
        == """\
longest context of /a/rather/long/folder/of/a/base, forecast with 51 GiB of host
memory to take

   card        tokens  bound by
6.0 GiB  does not fit  the card
 12 GiB        67,840  host memory
 24 GiB       123,456  the card or host memory"""
    )
