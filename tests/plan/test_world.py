"""Plans for several ranks: what each may take and holds, how fast they are together, and what joins them."""

import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from arithmetic import STANDING, ladder_of
from made_ranks import all_well, launch
from real_steps import recipe_for

from qtune.distributed.ranks import Ranks
from qtune.gpu_models import models_of
from qtune.hardware import Device
from qtune.plan import throughput
from qtune.plan.forecast import EXCHANGE, STEP
from qtune.plan.planner import budget_of
from qtune.plan.workload import BatchShape, Work
from qtune.plan.world import ALONE, LINKS, Link, World, link_of
from qtune.units import GIB

CARD = Device("cuda:0", "a card", 8 * GIB, 8 * GIB, "bfloat16", "a test", 32 * GIB, operations_per_second=1e12)
SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "cards_table.py"
PACKS = Work(4 * (BatchShape.of_one_document(100),))


def test_a_host_is_shared_by_the_ranks_on_it() -> None:
    recipe = recipe_for("demo")
    assert budget_of(recipe, CARD, World(4, 2)).host_bytes == round(0.8 * CARD.host_free_bytes / 2)
    asked = recipe.model_copy(update={"memory": recipe.memory.model_copy(update={"host_budget": "8GiB"})})
    assert budget_of(asked, CARD, World(4, 2)).host_bytes == 4 * GIB
    assert budget_of(asked, CARD, ALONE).host_bytes == 8 * GIB


def test_a_sum_sends_two_parts_of_n_less_one() -> None:
    link = Link("a link", bytes_per_second=100.0, seconds=0.5)
    assert World(4, 4, link).sum_seconds(1000) == 2 * (0.5 + 3 / 4 * 1000 / 100)
    assert ALONE.sum_seconds(1000) == 0


def test_gradients_are_thrice_there_before_the_step_of_several() -> None:
    ladder = ladder_of(PACKS)
    several = replace(ladder.forecaster, standing=replace(STANDING, ranks=2))
    alone = ladder.forecaster.forecast(ladder.foot, PACKS.heaviest(1)).phases
    phases = several.forecast(ladder.foot, PACKS.heaviest(1)).phases
    assert phases[EXCHANGE] == alone[STEP] - STANDING.optimizer_workspace_bytes + 12 * STANDING.trained_parameters
    assert EXCHANGE not in alone


@pytest.mark.parametrize(("packs", "most"), [(8, 4), (7, 4), (2, 1), (1, 1)])
def test_a_step_takes_as_long_as_the_rank_with_most_packs(packs: int, most: int) -> None:
    ladder = ladder_of(PACKS, gradient_accumulation=packs, micro_batch=1)
    world = World(2, 2, Link("a link", 1e6, 0.25))
    alone = throughput.estimate(ladder, 0.1, CARD, "bfloat16", steps=3)
    both = throughput.estimate(ladder, 0.1, CARD, "bfloat16", 3, world)
    summing = 2 * (0.25 + 4 * STANDING.trained_parameters / 2 / 1e6)
    assert both.pack_seconds == alone.pack_seconds is not None
    assert both.step_seconds == pytest.approx(most * alone.pack_seconds + summing)
    assert both.tokens_per_second == pytest.approx(packs * 100 / both.step_seconds)


def test_cards_are_read_as_people_write_them() -> None:
    assert [model.bytes for model in models_of("2x8GiB+16GiB")] == [8 * GIB, 8 * GIB, 16 * GIB]
    assert [model.name for model in models_of("2xRTX-3090+4090")] == ["RTX 3090", "RTX 3090", "RTX 4090"]
    for wrong in ("0x8GiB", "2x", "8GiB+", "2xRTX 9999", ""):
        with pytest.raises(ValueError, match="must be"):
            models_of(wrong)


def test_links_have_names_and_speeds() -> None:
    assert link_of("10GbE") == LINKS["10gbe"]
    assert link_of("5GB/s").bytes_per_second == 5e9
    with pytest.raises(ValueError, match=r"^must be one of nvlink4, .*, or bytes a second such as 5GB/s, and is wifi$"):
        link_of("wifi")


def test_parts_come_while_the_layer_before_them_computes() -> None:
    """Of ten layers of 100 bytes two ranks bring half each: ten calls of 0.01 s and 0.5 s."""
    world = World(2, 2, Link("a link", 1000.0, 0.01))
    assert world.pass_seconds(1.0, 2.0, 10, 1000) == pytest.approx(3.0 + 0.06)
    assert world.pass_seconds(0.2, 1.0, 10, 1000) == pytest.approx(0.6 + 1.0 + 0.06)


def test_the_page_has_the_table_of_the_model() -> None:
    made = importlib.util.spec_from_file_location("cards_table", SCRIPT)
    script = importlib.util.module_from_spec(made)
    made.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.written(), "scripts/cards_table.py --write"
    _, replicas, in_parts = script.seconds(script.MODELS[0], 2, "RTX 4090", "1gbe")
    assert in_parts > 10 * replicas  # a slow link carries gradients, and no layers


LARGE, SMALL, LAYERS = 2 << 20, 1 << 14, 6  # numbers of four bytes
REPEATS = 7


def least_seconds(ranks: Ranks, act: Callable[[], object], repeats: int = REPEATS) -> float:
    """Of all ranks the longest, and of all times the shortest: what others on the machine take is not in it."""
    times = []
    for _ in range(repeats):
        ranks.gather("all are here")
        start = time.perf_counter()
        act()
        times.append(max(ranks.gather(time.perf_counter() - start)))
    return min(times)


def ratios(ranks: Ranks, folder: str) -> None:
    """Measured over forecast: of a step of replicas, and of passes with layers in parts behind much and little."""
    size, square = ranks.size, torch.ones(400, 400)

    def compute() -> None:
        for _ in range(100):
            square @ square

    def link(of: Callable[[torch.Tensor], object], sent: float) -> Link:
        """From a small and a large buffer, of which each rank sends `sent`; as many in a row as there are layers."""

        def seconds(numbers: int) -> float:
            whole = torch.ones(numbers)
            return least_seconds(ranks, lambda: [of(whole) for _ in range(LAYERS)]) / LAYERS

        small, large = seconds(SMALL), seconds(LARGE)
        rate = sent * 4 * (LARGE - SMALL) / (large - small)
        return Link("gloo", rate, max(0.0, small - sent * 4 * SMALL / rate))

    def in_parts(forward: float, backward: float) -> None:
        """A card computes meanwhile, and the processor sleeps."""
        for seconds in (forward, backward):
            coming = ranks.exchange_parts(layers[0])
            for i in range(LAYERS):
                coming.wait()
                if i + 1 < LAYERS:
                    coming = ranks.exchange_parts(layers[i + 1])
                time.sleep(seconds / LAYERS)

    told = {}
    summed = link(ranks.sum_in_order, 2 * (size - 1) / size)
    world = World(size, size, replace(summed, seconds=summed.seconds / 2))
    passes, flat = least_seconds(ranks, compute), torch.ones(3 * LARGE // 4)
    measured = least_seconds(ranks, lambda: (compute(), ranks.sum_in_order(flat)))
    told["replicas"] = measured / (passes + world.sum_seconds(flat.nbytes))
    layers = [torch.ones(LARGE) for _ in range(LAYERS)]
    gathered = link(lambda whole: ranks.exchange_parts(whole).wait(), (size - 1) / size)
    world = World(size, size, gathered)
    all_come = LAYERS * gathered.seconds + world.sent_fraction * LAYERS * 4 * LARGE / gathered.bytes_per_second
    for name, share in (("much", 4.0), ("little", 0.2)):
        times = share * all_come, 2 * share * all_come
        measured = least_seconds(ranks, partial(in_parts, *times))
        told[name] = measured / world.pass_seconds(*times, LAYERS, LAYERS * 4 * LARGE)
    if ranks.is_first:
        Path(folder, "ratios.json").write_text(json.dumps(told))


@pytest.mark.long  # seconds of two processes, measured apart and together
def test_the_model_is_held_against_processes_that_talk(tmp_path: Path) -> None:
    """Once of three times, as others may use the machine."""
    for _ in range(3):
        all_well(launch(2, ratios, str(tmp_path)))
        told = json.loads((tmp_path / "ratios.json").read_text())
        if all(abs(ratio - 1) < 0.2 for ratio in told.values()):
            return
    pytest.fail(f"measured over forecast: {told}")
