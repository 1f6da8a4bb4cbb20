"""The steps of every optimizer, beside the update of its paper in float64, and the bytes that it says it keeps."""

import math
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer

from qtune.memory.memory_parts import optimizer_state
from qtune.memory.memory_tracker import block_bytes
from qtune.memory.oom_recovery import Recovery
from qtune.recipe.schema import Train
from qtune.train.atomic_step import keep_steps_whole
from qtune.train.lr_schedule import quicken
from qtune.train.optimizers import OPTIMIZERS
from qtune.train.schedule_free import ScheduleFreeAdamW

RATE, DECAY, STEPS = 1e-2, 0.1, 12
SMALL, LARGE = (24, 40), (96, 80)  # of 32 bits, and of 8
Update = Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]


def gradients(shape: tuple[int, int]) -> list[torch.Tensor]:
    """Those of a valley that is steeper across than along, with so much noise that their signs turn."""
    generator = torch.Generator().manual_seed(1)
    steep = torch.logspace(-1, 0, shape[1])
    return [steep * (0.5 + torch.randn(shape, generator=generator)) for _ in range(STEPS)]


def begin(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def stepped(name: str, shape: tuple[int, int]) -> torch.Tensor:
    weight = torch.nn.Parameter(begin(shape))
    made = OPTIMIZERS[name].made_with(RATE, STEPS)
    assert made is not None
    kind, settings = made
    optimizer = kind([weight], **settings, weight_decay=DECAY)
    for gradient in gradients(shape):
        weight.grad = gradient.clone()
        optimizer.step()
    if OPTIMIZERS[name].averages:
        optimizer.eval()
    return weight.detach()


def lion(w: torch.Tensor, all_g: list[torch.Tensor]) -> torch.Tensor:
    """Algorithm 2 of arXiv:2302.06675."""
    m = torch.zeros_like(w)
    for g in all_g:
        w = w - RATE * (torch.sign(0.9 * m + 0.1 * g) + DECAY * w)
        m = 0.99 * m + 0.01 * g
    return w


def ademamix(w: torch.Tensor, all_g: list[torch.Tensor]) -> torch.Tensor:
    """Algorithm 1 of arXiv:2409.03137, its schedules as long as the run."""
    m1, m2, v = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    b1, b2, last_b3 = 0.9, 0.999, 0.9999
    for t, g in enumerate(all_g, 1):
        alpha, part = 5.0 * t / STEPS, t / STEPS
        ln1, ln3 = math.log(b1), math.log(last_b3)
        b3 = min(math.exp(ln1 * ln3 / ((1 - part) * ln3 + part * ln1)), last_b3)
        m1, m2, v = b1 * m1 + (1 - b1) * g, b3 * m2 + (1 - b3) * g, b2 * v + (1 - b2) * g * g
        step = (m1 / (1 - b1**t) + alpha * m2) / ((v / (1 - b2**t)).sqrt() + 1e-8)
        w = w - RATE * (step + DECAY * w)
    return w


def newton_schulz(m: torch.Tensor) -> torch.Tensor:
    x = m / m.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def muon(w: torch.Tensor, all_g: list[torch.Tensor]) -> torch.Tensor:
    """K. Jordan's, with Nesterov's momentum, and the scale of arXiv:2502.16982."""
    m = torch.zeros_like(w)
    for g in all_g:
        m = 0.95 * m + 0.05 * g
        w = w - RATE * (0.2 * math.sqrt(max(w.shape)) * newton_schulz(0.95 * m + 0.05 * g) + DECAY * w)
    return w


def schedule_free(w: torch.Tensor, all_g: list[torch.Tensor]) -> torch.Tensor:
    """The three sequences of arXiv:2405.15682, all of them kept."""
    x, z, v = w, w, torch.zeros_like(w)
    for t, g in enumerate(all_g, 1):
        y = 0.1 * z + 0.9 * x
        v = 0.999 * v + 0.001 * g * g
        z = z - RATE * (g / ((v / (1 - 0.999**t)).sqrt() + 1e-8) + DECAY * y)
        x = (1 - 1 / t) * x + z / t
    return x


# The furthest that a weight may lie from where float64 has it, as a share of how far it went: in 32 bits, and in 8.
HELD_TO: dict[str, tuple[Update, float, float]] = {
    "lion_8bit": (lion, 1e-5, 0.06),
    "ademamix_8bit": (ademamix, 1e-5, 0.025),
    "muon": (muon, 0.01, 0.01),  # its products are in bfloat16 whatever the size
    "schedule_free_adamw": (schedule_free, 1e-5, 1e-5),
}


@pytest.mark.parametrize("shape", [SMALL, LARGE, LARGE[::-1]])
@pytest.mark.parametrize("name", HELD_TO)
def test_the_steps_are_those_of_the_paper(name: str, shape: tuple[int, int]) -> None:
    update, in_32_bits, in_8_bits = HELD_TO[name]
    exact = update(begin(shape).double(), [gradient.double() for gradient in gradients(shape)])
    error = (stepped(name, shape) - exact).norm() / (exact - begin(shape)).norm()
    assert error <= (in_32_bits if shape == SMALL else in_8_bits)


def test_each_step_of_muon_has_no_direction_that_is_much_longer_than_another() -> None:
    weight = torch.nn.Parameter(torch.zeros(16, 200))
    kind, settings = OPTIMIZERS["muon"].made_with(1.0, STEPS) or (None, {})
    weight.grad = gradients((16, 200))[0]
    kind([weight], **settings, weight_decay=0.0).step()
    lengths = torch.linalg.svdvals(weight.detach()) / (0.2 * math.sqrt(200))
    assert 0.5 < lengths.min() <= lengths.max() < 1.5
    assert weight.detach().square().mean().sqrt() == pytest.approx(0.2, rel=0.2)  # as AdamW's, says the paper


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_plan_knows_what_is_kept_of_a_weight(name: str) -> None:
    made = OPTIMIZERS[name].made_with(RATE, STEPS)
    for shape in [(7, 1), (63, 65), (64, 64), (300, 700)]:
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = torch.ones(shape)
        if made is None:
            continue  # transformers makes them: tests/plan/test_against_real_steps.py
        kind, settings = made
        optimizer = kind([weight], **settings)
        optimizer.step()
        kept = {id(each): each for each in optimizer_state(optimizer) if not _is_code_book(each)}
        assert sum(block_bytes(each.nbytes) for each in kept.values()) == OPTIMIZERS[name].state_bytes(weight.numel())


def _is_code_book(tensor: torch.Tensor) -> bool:
    return tensor.shape == (256,) and tensor.dtype == torch.float32


def test_a_step_that_fails_half_way_is_taken_again_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' package divides the gradient where it lies, and counts its steps where nobody puts them back."""
    move, faults = ScheduleFreeAdamW._move, [torch.OutOfMemoryError("out of memory")]

    def moved(self: ScheduleFreeAdamW, weight: torch.Tensor, *given: object) -> None:
        if weight.shape == LARGE and self is failing and self.state[weight] and faults:
            raise faults.pop()
        move(self, weight, *given)

    monkeypatch.setattr(ScheduleFreeAdamW, "_move", moved)
    weights = [[torch.nn.Parameter(begin(shape)) for shape in (SMALL, LARGE)] for _ in range(2)]
    whole, failing = optimizers = [ScheduleFreeAdamW(each, lr=RATE) for each in weights]
    for optimizer, of_it in zip(optimizers, weights, strict=True):
        keep_steps_whole(optimizer, Recovery(), lambda: "A step")
        for number in range(3):
            for weight in of_it:
                weight.grad = gradients(tuple(weight.shape))[number]
            optimizer.step()
            if number == 0:
                optimizer.eval()  # so that what was put aside then is put back, too
    assert not faults
    assert all(map(torch.equal, *weights))
    assert all(map(torch.equal, optimizer_state(whole), optimizer_state(failing)))


def test_the_average_is_there_while_it_is_looked_at_and_costs_nothing_after() -> None:
    weight = torch.nn.Parameter(begin(SMALL))
    optimizer = ScheduleFreeAdamW([weight], lr=RATE)
    optimizer.eval()  # before the first step there is nothing to average
    assert torch.equal(weight, begin(SMALL))
    for gradient in gradients(SMALL)[:5]:
        weight.grad = gradient
        optimizer.step()
    trained, kept = weight.detach().clone(), len(optimizer_state(optimizer))
    for _ in range(2):
        optimizer.eval()
    assert not torch.equal(weight, trained)
    assert len(optimizer_state(optimizer)) == kept + 1
    optimizer.train()
    assert torch.equal(weight, trained)
    assert len(optimizer_state(optimizer)) == kept


def test_b_of_an_adapter_moves_as_peft_has_it_move_in_lora_plus() -> None:
    """Its groups, with a B of 16 times the rate, and AdamW in both."""
    adapted = []
    for theirs in (True, False):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.Linear(32, 8))
        model = get_peft_model(layers, LoraConfig(r=4, target_modules=["0", "1"]))
        if theirs:
            optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16)
        else:
            trained = [weight for weight in model.parameters() if weight.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
            quicken(optimizer, [w for name, w in model.named_parameters() if ".lora_B." in name], 16)
            assert [group["lr"] for group in optimizer.param_groups] == [RATE, 16 * RATE]
        for number in range(4):
            inputs = torch.randn(5, 24, generator=torch.Generator().manual_seed(number))
            model(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.append([weight for weight in model.parameters() if weight.requires_grad])
    assert len(adapted[0]) == 4
    assert all(map(torch.equal, *adapted))


def test_a_recipe_that_names_no_rate_and_no_schedule_has_those_of_its_optimizer() -> None:
    of_each = {name: (Train(optimizer=name).learning_rate, Train(optimizer=name).schedule) for name in OPTIMIZERS}
    assert of_each["adamw_8bit"] == of_each["muon"] == (2e-4, "cosine")
    assert of_each["lion_8bit"] == (5e-5, "cosine")
    assert of_each["schedule_free_adamw"] == (4e-4, "constant")
    assert Train(optimizer="lion_8bit", learning_rate=1e-3).learning_rate == 1e-3
