"""Memory that runs out, anywhere in a run: real exceptions from inside the real model, optimizer and loss."""

import errno
import functools
import gc
import random
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import bitsandbytes
import pytest
import torch

from qtune.data.packing import PackedRow, collate
from qtune.errors import OutOfMemory, TrainingDiverged
from qtune.evaluate.held_out_loss import held_out_loss
from qtune.events import Evaluated, Event, Finished, Notice, StepDone
from qtune.hardware import find_device
from qtune.memory import fused_cross_entropy
from qtune.memory.engine import Engine
from qtune.memory.memory_report import Ledger
from qtune.memory.oom_recovery import OpenStep, Recovery, is_out_of_memory, let_go
from qtune.model import adapter, base
from qtune.model.loaded import Loaded
from qtune.model.tokenizer import load_tokenizer
from qtune.plan.plan import Plan
from qtune.plan.planner import decide
from qtune.plan.workload import Work
from qtune.recipe.schema import Data, Lora, Memory, Model, Recipe, Train
from qtune.train.atomic_step import HostCopy, keep_steps_whole
from qtune.train.learner import Learner
from qtune.train.loop import TrainingSession
from qtune.train.rows import HeldOutLoss, TrainingRows

STEPS, BATCHES, DOCUMENTS = 3, 3, 4
FIRST_LAYER = "base_model.model.model.layers.0"
CUDA_SENTENCE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.18 GiB is free."
)


def cuda_fault() -> Exception:
    return torch.OutOfMemoryError(CUDA_SENTENCE)


def wrapped(inner: Exception, with_cause: bool) -> Exception:
    try:
        try:
            raise inner
        except Exception as fault:
            if with_cause:
                raise ValueError("the layer failed") from fault
            raise KeyError("state1")  # noqa: B904
    except (ValueError, KeyError) as outer:
        return outer


def ring() -> Exception:
    """Two exceptions, each the other's cause."""
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    return first


SPELLINGS = [
    torch.OutOfMemoryError(CUDA_SENTENCE),
    torch.cuda.OutOfMemoryError("HIP out of memory. Tried to allocate 20.00 MiB."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError(CUDA_SENTENCE),
    RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("cudaErrorMemoryAllocation: out of resources"),
    RuntimeError("CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("CUDA error: CUSPARSE_STATUS_ALLOC_FAILED"),
    RuntimeError("CURAND_STATUS_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("Error out of memory at line 380 in file /src/csrc/ops.cu"),
    RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1016'),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
NEAR_MISSES = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSetStream(handle, stream)`"),
    RuntimeError(
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input"
    ),
    RuntimeError("CUDA error: misaligned address"),
    RuntimeError("shape '[4, 5]' is invalid for input of size 6: not in memory format"),
    RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
    RuntimeError("Trying to backward through the graph a second time"),
    RuntimeError('value == 1 INTERNAL ASSERT FAILED at "/pytorch/c10/core/TensorImpl.cpp":7'),
    ValueError("data.train has the row 'CUDA out of memory'"),
    OSError(errno.ENOSPC, "No space left on device"),
    TrainingDiverged("Step 3: the loss is not a finite number"),
    OutOfMemory("Step 3 ran out of memory, and nothing is left"),
    KeyboardInterrupt("out of memory"),
    ring(),
]


def named(faults: Iterable[BaseException]) -> list:
    return [pytest.param(fault, id=f"{type(fault).__name__}: {str(fault)[:40]}") for fault in faults]


@pytest.mark.parametrize("fault", named(SPELLINGS))
def test_every_spelling_is_known_wrapped_or_not(fault) -> None:
    assert is_out_of_memory(fault)
    assert is_out_of_memory(wrapped(fault, with_cause=True))
    assert is_out_of_memory(wrapped(fault, with_cause=False))


@pytest.mark.parametrize("fault", named(NEAR_MISSES))
def test_what_only_sounds_like_it_is_not_taken_for_it(fault) -> None:
    assert not is_out_of_memory(fault)


def test_a_fault_that_hides_where_it_came_from_is_taken_at_its_word() -> None:
    fault = wrapped(cuda_fault(), with_cause=False)
    assert is_out_of_memory(fault)
    fault.__suppress_context__ = True  # raise ... from None
    assert not is_out_of_memory(fault)


def packs(count: int, seed: int = 0) -> list[PackedRow]:
    rng, result = random.Random(seed), []
    for _ in range(count):
        documents = [[0, *(rng.randrange(6, 80) for _ in range(rng.randint(6, 20)))] for _ in range(DOCUMENTS)]
        result.append(
            {
                "input_ids": [token for document in documents for token in document],
                "labels": [label for document in documents for label in (-100, -100, *document[2:])],
                "seq_lengths": [len(document) for document in documents],
            }
        )
    return result


def recipe_for(folder: Path, dropout: float = 0.0, quantization: str = "none", **train: object) -> Recipe:
    rank = 64 if train.get("optimizer") == "paged_adamw_8bit" else 4  # under 4096 weights it keeps 32 bits
    settings = {"learning_rate": 3e-4, "optimizer": "adamw", "gradient_accumulation": BATCHES, "warmup_fraction": 0.0}
    return Recipe(
        name="t",
        model=Model(base=str(folder), quantization=quantization, compute_dtype="float32"),
        lora=Lora(rank=rank, alpha=8, dropout=dropout),
        data=Data(train="rows.jsonl"),
        train=Train(max_steps=STEPS, epochs=100.0, eval_every=2, **{**settings, **train}),
        memory=Memory(keep_layers=2, rehearse=False),
    )


@functools.cache
def plan_for(recipe: str) -> Plan:
    """Settled once for each recipe, which is many runs."""
    settled = Recipe.model_validate_json(recipe)
    return decide(settled, find_device(), base.read_config(settled.model), Work.of_rows(packs(STEPS * BATCHES)))


class Run:
    """A run of `STEPS` steps, what it told, and what it left."""

    def __init__(self, recipe: Recipe, folder: Path, disturb: Callable[["Run"], object] | None = None, climbs: int = 0):
        self.events: list[Event] = []
        self.climbs_left = climbs
        self.plan = plan = plan_for(recipe.model_dump_json())
        ledger = Ledger.begin(plan.device)
        loaded = base.load_base(recipe.model, plan.device.name, plan.compute_dtype)
        self.model = adapter.attach(loaded, recipe.lora, recipe.train.seed)
        self.engine = Engine(self.model)
        self.engine.switch_to(plan.techniques)
        self.held_out = packs(2, seed=1)
        self.loaded = Loaded(self.model, load_tokenizer(recipe.model), plan.device.name, plan.compute_dtype)
        self.recovery = Recovery(self.hear, self.climb, self.engine.forget_pass)
        learner = Learner(self.loaded, self.engine, self.recovery, ledger)
        rows = TrainingRows(
            packs(STEPS * BATCHES), HeldOutLoss(len(self.held_out), lambda: (self.measure(), {}), self.measure)
        )
        session = TrainingSession(recipe, plan, learner, rows, self.hear)
        self.weights: list[list[torch.Tensor]] = [self.weights_now()]
        if disturb is not None:
            disturb(self)
        self.fault: OutOfMemory | None = None
        try:
            session.run()
        except OutOfMemory as fault:
            self.fault = fault

    def measure(self) -> float:
        return held_out_loss(self.loaded, self.held_out, self.recovery)

    def hear(self, event: Event) -> None:
        """By way of `listen`, in whose place a test may put another."""
        self.listen(event)

    def listen(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, StepDone):
            self.weights.append(self.weights_now())

    def climb(self) -> str | None:
        """Recompute the layers, the first time; then nothing but the sentence."""
        if self.climbs_left == 0:
            return None
        self.climbs_left -= 1
        self.engine.switch_to(replace(self.engine.techniques, recomputed_layers=2))
        return "every layer is recomputed"

    def weights_now(self) -> list[torch.Tensor]:
        return [weight.detach().clone() for weight in adapter.trained_parameters(self.model)]

    @property
    def norm(self) -> torch.nn.Module:
        return self.model.get_base_model().model.norm

    @property
    def notices(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Notice)]

    def told(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Every recovery collects garbage; what the libraries hold need not be walked each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def undisturbed(tiny_base, tmp_path_factory) -> Callable[..., Run]:
    """The same run with nothing in its way, made once for each setting."""
    kept: dict[tuple, Run] = {}

    def make(**settings: object) -> Run:
        key = tuple(sorted(settings.items()))
        if key not in kept:
            kept[key] = Run(recipe_for(tiny_base, **settings), tmp_path_factory.mktemp("undisturbed"))
        return kept[key]

    return make


def assert_same(run: Run, other: Run, tolerance: float = 1e-6) -> None:
    """Weights within `tolerance` (equal to the bit at 0), and the same told but for what was redone."""
    assert run.fault is None
    for mine, theirs in zip(run.weights_now(), other.weights_now(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)
    assert run.told(Finished)[0].steps == STEPS
    for kind, exact in (
        (StepDone, ("step", "epoch", "learning_rate", "tokens", "trained_tokens")),
        (Evaluated, ("step",)),
    ):
        assert [[getattr(e, name) for name in exact] for e in run.told(kind)] == [
            [getattr(e, name) for name in exact] for e in other.told(kind)
        ]
        assert [e.loss for e in run.told(kind)] == pytest.approx([e.loss for e in other.told(kind)], abs=tolerance)
    norms, others = ([step.grad_norm for step in r.told(StepDone)] for r in (run, other))
    assert norms == pytest.approx(others, rel=1e-5 if tolerance else 0)


class FaultAt:
    """Raises on the calls numbered in `at`, from 0."""

    def __init__(self, at: Iterable[int], fault: Callable[[], BaseException] = cuda_fault):
        self.at, self.fault, self.calls = set(at), fault, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls - 1 in self.at:
            raise self.fault()


def in_forward(fault: FaultAt) -> Callable[[Run], object]:
    """Raise when the layers have run, in a training pass; their recomputation does not come by here."""
    return lambda run: run.norm.register_forward_pre_hook(lambda norm, _: fault() if norm.training else None)


def in_backward(fault: FaultAt) -> Callable[[Run], object]:
    """Raise when the first layer gets a gradient, the second having added its own."""

    def disturb(run: Run) -> None:
        weight = run.model.get_parameter(f"{FIRST_LAYER}.mlp.down_proj.lora_B.default.weight")
        weight.register_hook(lambda gradient: fault())

    return disturb


def in_evaluation(fault: FaultAt) -> Callable[[Run], object]:
    return lambda run: run.norm.register_forward_pre_hook(lambda norm, _: None if norm.training else fault())


PLACES = {"forward pass": in_forward, "backward pass": in_backward}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_pass_that_runs_out_changes_nothing_but_the_pieces(tiny_base, tmp_path, undisturbed, place, batch) -> None:
    run = Run(recipe_for(tiny_base), tmp_path, PLACES[place](FaultAt([BATCHES + batch])))
    assert_same(run, undisturbed())
    assert run.notices == [
        f"Step 2 ran out of memory in the {place} and is done again: every batch in up to 2 pieces from here on"
    ]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("batch", [0, STEPS * BATCHES - 1])
def test_the_first_step_and_the_last_are_like_any_other(tiny_base, tmp_path, undisturbed, place, batch) -> None:
    run = Run(recipe_for(tiny_base), tmp_path, PLACES[place](FaultAt([batch])))
    assert_same(run, undisturbed())
    assert len(run.notices) == 1


@pytest.mark.parametrize("fault", named(SPELLINGS[::4]))
def test_every_spelling_is_recovered_from(tiny_base, tmp_path, undisturbed, fault) -> None:
    run = Run(recipe_for(tiny_base), tmp_path, in_backward(FaultAt([4], lambda: fault)))
    assert_same(run, undisturbed())
    assert len(run.notices) == 1


@pytest.mark.parametrize("place", PLACES)
def test_several_in_a_row_halve_down_to_documents_and_then_climb(tiny_base, tmp_path, undisturbed, place) -> None:
    run = Run(recipe_for(tiny_base), tmp_path, PLACES[place](FaultAt([4, 5, 6, 7])), climbs=2)
    assert_same(run, undisturbed())
    assert [notice.split(": ")[1] for notice in run.notices] == [
        "every batch in up to 2 pieces from here on",
        "every batch in up to 4 pieces from here on",
        "every layer is recomputed",
        "every layer is recomputed",
    ]


def test_again_and_again_in_one_step_tells_its_loss_once(tiny_base, tmp_path, undisturbed) -> None:
    """First at the third batch, then at the second of the redone ones, then at the third again."""
    run = Run(recipe_for(tiny_base), tmp_path, in_backward(FaultAt([5, 9, 20])), climbs=1)
    assert_same(run, undisturbed())
    assert len(run.notices) == 3
    assert all(notice.startswith("Step 2 ") for notice in run.notices)


@pytest.mark.parametrize("settings", [{"optimizer": "paged_adamw_8bit", "quantization": "nf4"}, {"micro_batch": 3}])
def test_other_optimizers_and_batches_come_out_the_same(tiny_base, tmp_path, undisturbed, settings) -> None:
    accumulation = BATCHES // settings.get("micro_batch", 1)
    settings = {**settings, "gradient_accumulation": accumulation}
    run = Run(recipe_for(tiny_base, **settings), tmp_path, in_backward(FaultAt([accumulation])))
    # in 8 bits a sum in another order may tip a moment into the next of its 256 values: a hundredth of a step of 3e-4
    assert_same(run, undisturbed(**settings), tolerance=1e-5 if "optimizer" in settings else 1e-6)
    assert len(run.notices) == 1


def test_a_head_without_tiles_is_cut_like_any_other(tiny_base, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fused_cross_entropy, "suits", lambda model: False)
    expected = Run(recipe_for(tiny_base), tmp_path / "plain")
    assert_same(Run(recipe_for(tiny_base), tmp_path / "disturbed", in_backward(FaultAt([4, 5]))), expected)


@pytest.mark.parametrize("place", PLACES)
def test_without_pieces_dropout_included_it_is_equal_to_the_bit(
    tiny_base, tmp_path, undisturbed, monkeypatch, place
) -> None:
    """One document a pack leaves nothing to halve. What is switched on, recomputing layers, is exact."""
    monkeypatch.setattr(f"{__name__}.DOCUMENTS", 1)
    settings = {"dropout": 0.2}
    expected = Run(recipe_for(tiny_base, **settings), tmp_path / "plain")
    run = Run(recipe_for(tiny_base, **settings), tmp_path / "disturbed", PLACES[place](FaultAt([4, 5])), climbs=2)
    assert_same(run, expected, tolerance=0)
    assert run.notices == [f"Step 2 ran out of memory in the {place} and is done again: every layer is recomputed"] * 2


def after_some_weights(monkeypatch: pytest.MonkeyPatch, optimizer: str, fault: FaultAt) -> None:
    """Raise from inside the optimizer, after one more weight has been updated."""
    owner, kernels = {
        "adamw": (torch.Tensor, ["addcdiv_"]),
        "paged_adamw_8bit": (bitsandbytes.functional, ["optimizer_update_32bit", "optimizer_update_8bit_blockwise"]),
    }[optimizer]

    def failing(kernel: Callable) -> Callable:
        def update(*args: object, **kwargs: object) -> object:
            result = kernel(*args, **kwargs)
            fault()
            return result

        return update

    for name in kernels:
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))


WEIGHTS = 2 * 7 * 2  # layers, linears, A and B


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("times", [1, 2])
def test_an_optimizer_step_that_runs_out_is_taken_whole(
    tiny_base, tmp_path, undisturbed, monkeypatch, optimizer, step, times
) -> None:
    """It fails after the fifth weight; before the first step there is no state, which must then be gone again."""
    settings = {"optimizer": optimizer, "dropout": 0.1}
    expected = undisturbed(**settings)
    start = step * WEIGHTS + 4
    after_some_weights(monkeypatch, optimizer, FaultAt([start + 5 * i for i in range(times)]))
    run = Run(recipe_for(tiny_base, **settings), tmp_path, climbs=1)
    assert_same(run, expected, tolerance=0)
    done = ["unused memory was given back first", "every layer is recomputed"][:times]
    assert run.notices == [
        f"Step {step + 1} ran out of memory in the optimizer step and is done again: {d}" for d in done
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
def test_an_optimizer_step_that_never_fits_leaves_the_last_whole_one(
    tiny_base, tmp_path, monkeypatch, optimizer
) -> None:
    after_some_weights(monkeypatch, optimizer, FaultAt(range(WEIGHTS + 4, 1000)))
    run = Run(recipe_for(tiny_base, optimizer=optimizer), tmp_path, climbs=1)
    assert str(run.fault).startswith("Step 2 ran out of memory in the optimizer step, and no memory technique is left")
    assert "Lower lora.rank" in str(run.fault)
    assert_weights_of_step(run, 1)


def test_a_second_ctrl_c_in_the_optimizer_step_leaves_whole_weights(tiny_base, tmp_path, monkeypatch) -> None:
    after_some_weights(monkeypatch, "adamw", FaultAt([WEIGHTS + 4], KeyboardInterrupt))
    runs: list[Run] = []
    with pytest.raises(KeyboardInterrupt):
        Run(recipe_for(tiny_base), tmp_path, runs.append)
    assert_weights_of_step(runs[0], 1)


def test_a_gradient_scaler_goes_on_with_the_step(monkeypatch) -> None:
    """As with float16 on a card: the scaler counts the step as taken once, by the optimizer it knows."""
    weights = {}
    for at in ([], [1]):
        with monkeypatch.context() as patch:
            after_some_weights(patch, "adamw", FaultAt(at))
            torch.manual_seed(0)
            model, scaler = torch.nn.Linear(4, 4), torch.amp.GradScaler("cpu", init_scale=8.0)
            optimizer = torch.optim.AdamW(model.parameters())
            told: list[Event] = []
            keep_steps_whole(optimizer, Recovery(told.append), lambda: "Step 1")
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            for _ in range(2):
                optimizer.zero_grad()
                scaler.scale(model(torch.ones(2, 4)).square().sum()).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
            assert len(told) == len(at)
            weights[len(at)] = [weight.detach().clone() for weight in model.parameters()]
    assert all(map(torch.equal, weights[0], weights[1]))


def assert_weights_of_step(run: Run, step: int) -> None:
    assert all(map(torch.equal, run.weights_now(), run.weights[step]))
    assert not all(map(torch.equal, run.weights[step], run.weights[step - 1]))


@pytest.mark.parametrize("place", PLACES)
def test_a_step_that_never_fits_ends_with_the_last_whole_one(tiny_base, tmp_path, place) -> None:
    run = Run(recipe_for(tiny_base), tmp_path, PLACES[place](FaultAt(range(2 * BATCHES, 1000))), climbs=1)
    assert str(run.fault).startswith(f"Step 3 ran out of memory in the {place} with nothing but one document of ")
    assert "Set data.max_tokens to " in str(run.fault)
    assert run.fault.exit_code == 1
    assert len(run.notices) == 3
    assert_weights_of_step(run, 2)
    assert all(weight.grad is None for weight in adapter.trained_parameters(run.model))


@pytest.mark.parametrize(("at", "pieces"), [([0], [2]), ([1], [2]), ([0, 1, 2], [2, 4, 0]), ([0, 3], [2, 4])])
def test_an_evaluation_that_runs_out_measures_the_same(tiny_base, tmp_path, undisturbed, at, pieces) -> None:
    run = Run(recipe_for(tiny_base), tmp_path, in_evaluation(FaultAt(at)), climbs=1)
    assert_same(run, undisturbed())
    done = [f"every batch in up to {n} pieces from here on" if n else "every layer is recomputed" for n in pieces]
    assert run.notices == [
        f"The held-out loss ran out of memory in the forward pass and is done again: {d}" for d in done
    ]
    assert run.recovery.pieces == max(pieces)


def test_an_evaluation_that_never_fits_ends_the_run_after_a_whole_step(tiny_base, tmp_path) -> None:
    run = Run(recipe_for(tiny_base), tmp_path, in_evaluation(FaultAt(range(1000))))
    assert str(run.fault).startswith("The held-out loss ran out of memory in the forward pass with nothing but one")
    assert run.model.training
    assert [step.step for step in run.told(StepDone)] == [1, 2]  # a loss stands before the held-out loss after it
    assert not all(map(torch.equal, run.weights_now(), run.weights[1]))  # those of step 2, after which it was measured


def test_memory_that_runs_out_between_passes_is_a_refusal_too(tiny_base, tmp_path, monkeypatch) -> None:
    calls = FaultAt([BATCHES - 2])
    measure = Ledger.measure
    monkeypatch.setattr("qtune.train.callbacks.SECONDS_BETWEEN_LEDGERS", 0.0)
    monkeypatch.setattr(Ledger, "measure", lambda self, *args: (calls(), measure(self, *args))[1])
    run = Run(recipe_for(tiny_base), tmp_path)
    assert "ran out of memory between its passes (CUDA out of memory. Tried" in str(run.fault)


def test_any_other_fault_ends_the_run_as_it_is(tiny_base, tmp_path) -> None:
    illegal = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Run(recipe_for(tiny_base), tmp_path, in_backward(FaultAt([4], lambda: illegal)))


@pytest.mark.parametrize("place", PLACES)
def test_nothing_of_the_failed_attempt_is_alive_when_the_next_begins(tiny_base, tmp_path, place) -> None:
    born: list[weakref.ref] = []
    alive: list[int] = []
    fault = FaultAt([4])

    def remember(module: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        if module.training and not alive and isinstance(output, torch.Tensor):
            born.append(weakref.ref(output))

    def disturb(run: Run) -> None:
        for module in run.model.modules():
            module.register_forward_hook(remember)
        PLACES[place](fault)(run)
        listen = run.listen

        def count(event: Event) -> None:
            if isinstance(event, Notice):
                alive.append(sum(ref() is not None for ref in born))
                alive.append(sum(weight.grad is not None for weight in adapter.trained_parameters(run.model)))
            listen(event)

        run.listen = count

    Run(recipe_for(tiny_base), tmp_path, disturb)
    assert len(born) > 4 * 8
    assert alive == [0, 0]


def test_the_losses_told_add_up_to_those_of_the_last_attempt() -> None:
    """With dropout, pieces draw other masks: what was told of the batches before must be put right."""
    attempts = iter([1.0, 2.0, 3.0, 4.0, "fails", *[10.0] * 12])

    def run(piece: dict) -> torch.Tensor:
        loss = next(attempts)
        if loss == "fails":
            raise cuda_fault()
        return torch.tensor(loss)

    batch = collate(packs(1))
    step = OpenStep(Recovery(pieces=2), "Step 1", torch.device("cpu"), lambda: None)
    told = [step.add(batch, run).item() for _ in range(3)]
    assert told == [1.0 + 2.0, 3.0 + 4.0, 120.0 - 10.0]


def test_letting_go_of_a_fault_frees_what_its_frames_hold() -> None:
    held: list[weakref.ref] = []

    def fail() -> None:
        activation = torch.zeros(8)
        held.append(weakref.ref(activation))
        raise cuda_fault()

    try:
        fail()
    except RuntimeError as fault:
        assert held[0]() is not None
        let_go(fault)
        assert held[0]() is None


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, bitsandbytes.optim.AdamW8bit])
def test_the_copy_holds_weights_and_state_in_the_same_buffer_each_time(optimizer) -> None:
    """P weights: 4P bytes and 8P of state, or 2P and two scales a block of 256 in 8 bits (and its two tables)."""
    weight = torch.nn.Parameter(torch.randn(128, 64))
    optimizer = optimizer([weight], lr=0.1)
    copy = HostCopy(optimizer)
    copy.take()
    assert copy.bytes == 4 * weight.numel()
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    copy.take()
    buffers = [place.data_ptr() for place in copy._copies]
    state = 8 * weight.numel() + 4
    if isinstance(optimizer, bitsandbytes.optim.AdamW8bit):
        state = 2 * weight.numel() + 2 * 4 * weight.numel() // 256 + 2 * 4 * 256
    assert copy.bytes == 4 * weight.numel() + state
    before = [weight.detach().clone(), *(v.clone() for v in optimizer.state[weight].values() if torch.is_tensor(v))]
    optimizer.step()
    copy.put_back()
    after = [weight.detach(), *(v for v in optimizer.state[weight].values() if torch.is_tensor(v))]
    assert all(map(torch.equal, before, after))
    copy.take()
    assert [place.data_ptr() for place in copy._copies] == buffers


def test_a_climb_that_fails_for_want_of_memory_is_a_refusal(tiny_base, tmp_path) -> None:
    def disturb(run: Run) -> None:
        in_forward(FaultAt([0, 1, 2]))(run)

        def climb() -> str:
            raise cuda_fault()

        run.climb = climb

    run = Run(recipe_for(tiny_base), tmp_path, disturb)
    assert "Step 1 ran out of memory" in str(run.fault)
    assert all(map(torch.equal, run.weights_now(), run.weights[0]))


def test_forgetting_comes_before_climbing() -> None:
    told: list[str] = []
    recovery = Recovery(
        lambda event: told.append("told"), lambda: told.append("climb") or "x", lambda: told.append("forget")
    )
    recovery.after_pass("Step 1", "forward pass", [7])
    assert told == ["forget", "climb", "told"]
    assert recovery.pieces == 1


@pytest.mark.parametrize(("tokens", "advised"), [(2048, 1024), (9, 8)])
def test_a_document_that_does_not_fit_is_advised_to_be_half_as_long(tokens: int, advised: int) -> None:
    """Advice to leave it as long as it is would end in the same place."""
    with pytest.raises(OutOfMemory, match=rf"one document of {tokens:,} tokens.* Set data\.max_tokens to {advised} "):
        Recovery().after_pass("Step 3", "forward pass", [tokens])
