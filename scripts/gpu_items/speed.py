"""Seconds: what the card does at best, what a technique adds to a step, and how fast a model answers."""

import statistics
from collections.abc import Iterator
from functools import partial

import torch
from profile_memory import any_tokenizer, step

from qtune.evaluate import generate
from qtune.memory.techniques import STEPS, Techniques
from qtune.model.loaded import Loaded

from .lab import Figures, Lab, let_memory_go, on, recomputed

LAYERS = 8  # of 32: what a technique adds is a share of each layer's time, and all layers are alike
LENGTHS = ((2048, 7), (8192, 3))  # tokens, and how many rounds
NEW_TOKENS = 32


def machine_rows(lab: Lab) -> Iterator[Figures]:
    """16-bit products of matrices, and copies from page-locked memory."""
    size, count = (8192, 20) if lab.device.is_card else (128, 2)
    square = torch.randn(size, size, device=lab.device.name, dtype=torch.bfloat16)
    home = torch.empty(size * size * 4, dtype=torch.uint8, pin_memory=lab.device.is_card)
    there = torch.empty_like(home, device=lab.device.name)

    def product() -> None:
        for _ in range(count):
            square @ square

    def copies() -> None:
        for _ in range(count):
            there.copy_(home, non_blocking=True)

    product_seconds, copies_seconds = (min(lab.timed(act) for _ in range(3)) for act in (product, copies))
    yield {
        "card": lab.device.label,
        "total_bytes": lab.device.total_bytes,
        "outside_bytes": lab.device.outside_bytes,
        "tflops": count * 2 * size**3 / product_seconds / 1e12,
        "copy_gb_per_second": count * home.nbytes / copies_seconds / 1e9,
    }


def cost_rows(lab: Lab) -> Iterator[Figures]:
    """Step times and peaks with a technique and without, by turns, on two models of the same weights.

    Recomputation is on in both but in its own row.
    """
    forecaster = lab.forecaster("llama_8b", layers=LAYERS)
    under = recomputed(forecaster)
    tried = {"recompute layers": (Techniques(), under)}
    for rung in STEPS[1:]:
        higher = rung.up(under, forecaster.standing)
        if rung.technique not in forecaster.standing.refusals and higher not in [one for _, one in tried.values()]:
            tried[rung.name] = (under, higher)
    without, stage_without = None, None
    for name, (below, techniques) in lab.some(tuple(tried.items()), 3):
        if below != without:
            without, stage_without = below, None
            let_memory_go()
            stage_without = lab.build(forecaster, below)
        stage = lab.build(forecaster, techniques)
        for length, rounds in lab.some(LENGTHS):
            batch = lab.batch(forecaster, lab.tokens(length))
            peaks = [lab.measure(each, batch)["allocated_bytes"] for each in (stage, stage_without)]  # and warms up
            steps = [partial(step, each, batch) for each in (stage, stage_without)]
            pairs = [tuple(map(lab.timed, steps)) for _ in lab.some(range(rounds))]
            yield {
                "technique": name,
                "set": on(techniques),
                "layers": forecaster.layers,
                "tokens": lab.tokens(length),
                "step_seconds": statistics.median(one for one, _ in pairs),
                "without_seconds": statistics.median(other for _, other in pairs),
                "cost_fraction": statistics.median(one / other for one, other in pairs) - 1,
                "peak_bytes": peaks[0],
                "without_peak_bytes": peaks[1],
            }
        del stage, steps
        let_memory_go()


def generation_rows(lab: Lab) -> Iterator[Figures]:
    """One answer of `NEW_TOKENS` tokens, the weights on the card, and what can be in host memory there."""
    forecaster = lab.forecaster("llama_8b", layers=LAYERS)
    half = max(1, forecaster.layers // 2)
    ways = (
        Techniques(),
        Techniques(host_embedding=True),
        Techniques(head="host"),
        Techniques(streamed_layers=half),
        Techniques(streamed_layers=forecaster.layers, host_embedding=True, head="host"),
    )
    prompt = lab.rows(forecaster, [lab.tokens(512)])[0]["input_ids"]
    new_tokens = lab.some([4, NEW_TOKENS])[-1]
    for techniques in ways:
        stage = lab.build(forecaster, techniques)
        loaded = Loaded(stage.model, any_tokenizer(), lab.device.name, lab.device.compute_dtype)
        answer = partial(generate.answer, loaded, [prompt], [], new_tokens)
        seconds = min(lab.timed(answer) for _ in range(2))
        yield {
            "weights": on(techniques),
            "layers": forecaster.layers,
            "new_tokens": new_tokens,
            "tokens_per_second": new_tokens / seconds,
        }
        del stage, loaded, answer
        let_memory_go()
