"""L5: a loss or a gradient that is no number stops the run before its step, and what was good is kept."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from fault_lab.workshop import Workshop, difference

WHAT = "a loss or gradient becomes NaN or infinite in a random step"
STEPS = 14


def run(cases: int, seed: int, folder: Path) -> Iterator[str | None]:
    shop = Workshop.open(folder, seed)
    recipe = shop.recipe(train={"epochs": 2})
    shop.undisturbed(recipe)
    for case in range(cases):
        rng = random.Random(f"{seed} {case}")
        value = rng.choice([float("nan"), float("inf"), float("-inf")])
        shop.clear("poisoned")
        yield _one(shop, recipe, rng.randint(1, STEPS), ("loss", "gradient")[case % 2], value)


def _one(shop: Workshop, recipe: Path, step: int, what: str, value: float) -> str | None:
    told = f"{what} {value} in step {step}"
    ended = shop.start(recipe, "poisoned", _poison(step, what, value)).wait()
    said = " ".join(ended.text.split())
    if ended.code != 1 or "Traceback" in ended.text:
        return f"{told}: exit {ended.code}, {ended.last_line}"
    if f"Step {step}: the {what} is not a finite number, so the step was not taken." not in said:
        return f"{told}: it said {ended.last_line}"
    if "rows.jsonl:" not in said:
        return f"{told}: the rows are not named: {ended.last_line}"
    run = shop.folder / "poisoned"
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    if not all(torch.isfinite(weight).all() for weight in weights.values()):
        return f"{told}: the adapter that was kept is not finite"
    again = shop.start(recipe, "poisoned").wait()
    if again.code != 0:
        return f"{told}: resumed with exit {again.code}, {again.last_line}"
    fault = difference(run, shop.folder / "undisturbed")
    return None if fault is None else f"{told}: {fault}"


def _poison(step: int, what: str, value: float) -> Callable[[], None]:
    """In the child: have the loss, or the gradient alone, of `step` be `value`."""

    def prepare() -> None:
        from qtune.train.trainer import MeteredTrainer

        compute = MeteredTrainer.compute_loss

        def compute_poisoned(self: MeteredTrainer, *args: object, **kwargs: object) -> torch.Tensor:
            loss = compute(self, *args, **kwargs)
            if not self.model.training or self.state.global_step != step - 1 or not self.is_in_train:
                return loss
            if what == "loss":
                return loss * value
            loss.register_hook(lambda gradient: gradient * value)
            return loss

        MeteredTrainer.compute_loss = compute_poisoned  # type: ignore[method-assign]

    return prepare
