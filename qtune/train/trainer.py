"""trl's SFTTrainer, made to take steps whole, in an order of our own, and to save and go on as a checkpoint says;
and the only file that knows how trl and transformers spell their settings."""

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerControl
from trl import SFTConfig, SFTTrainer

from qtune import accelerator
from qtune.data.packing import collate
from qtune.distributed.ranks import ALONE, Ranks
from qtune.errors import TrainingDiverged
from qtune.hardware import Device
from qtune.memory import fused_cross_entropy, pair_loss
from qtune.memory.oom_recovery import Batch, OpenStep
from qtune.model.adapter import trained_parameters
from qtune.recipe.schema import Recipe
from qtune.train.atomic_step import keep_steps_whole
from qtune.train.checkpoint_files import Checkpoint
from qtune.train.learner import Learner
from qtune.train.lr_schedule import Rate, quicken, rate_of, wind
from qtune.train.objectives import OBJECTIVES, Objective
from qtune.train.optimizer_state import Tensors, put_random_back, take_random
from qtune.train.optimizers import OPTIMIZERS, Optimizer
from qtune.train.replicas import SharedSteps, counted_in, draw_own_random, empty_batch, in_batches, is_empty, tokens_in
from qtune.train.rows import TrainingRows
from qtune.train.sampler import DataOrder

if TYPE_CHECKING:
    from qtune.plan.plan import Plan

SHOWN_PLACES = 5


def sft_config(recipe: Recipe, plan: "Plan", folder: Path) -> SFTConfig:
    """Settings for rows that are tokenised, cut and packed already; trl prepares, saves and prints nothing itself."""
    train = recipe.train
    settings = SFTConfig(
        output_dir=str(folder.absolute()),  # wandb takes a name that is the folder as well for a slip
        max_steps=plan.steps,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.gradient_accumulation,
        learning_rate=train.learning_rate,
        lr_scheduler_type="constant",  # the trainer's is made of a `Descent`
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=OPTIMIZERS[train.optimizer].made_by,
        gradient_checkpointing=False,  # ours is memory.gradient_checkpointing
        bf16=plan.compute_dtype == "bfloat16",
        fp16=plan.compute_dtype == "float16",
        use_cpu=not plan.device.is_card,
        seed=train.seed,
        data_seed=train.seed,
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="no",
        prediction_loss_only=True,
        save_strategy="no",
        report_to=[],  # train.callbacks tells them
        run_name=folder.name,
        project="qtune",
        disable_tqdm=True,
        dataloader_pin_memory=plan.device.is_card,
        remove_unused_columns=False,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        router_aux_loss_coef=0.0,  # routers do not train, and balance over a pack is not that of its documents
    )
    return _on_one_device(settings, plan.device)


def _on_one_device(settings: SFTConfig, device: Device) -> SFTConfig:
    """By themselves they take the first card, have torch compute there, and spread batches over all that are seen."""
    place = torch.device(device.name)
    vars(settings)["_setup_devices"], settings._n_gpu = place, int(device.is_card)
    if device.is_card:
        accelerator.compute_on(place)
    return settings


@dataclass
class Meter:
    """What passed through the trainer since the last log line; `loss` is the sum of its steps' losses."""

    tokens: int = 0
    trained_tokens: int = 0
    wait_seconds: float = 0.0
    other_seconds: float = 0.0
    steps: int = 0
    loss: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def count(self, tokens: int, trained_tokens: int) -> None:
        self.tokens += tokens
        self.trained_tokens += trained_tokens

    def as_json(self) -> dict[str, Any]:
        """The same, and how long ago `since` was, which means nothing to another process."""
        values = asdict(self)
        return {**values, "since": time.perf_counter() - values["since"]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Meter":
        return cls(**{**values, "since": time.perf_counter() - values["since"]})


@dataclass(frozen=True)
class Descent:
    """How the trained weights go down: by which optimizer, at what share of the peak rate after so many steps, and B at
    `ratio` times that; and the loss that goes down with them, of which `beta` is a part where it is of pairs."""

    optimizer: Optimizer
    rate: Rate
    ratio: float
    objective: Objective
    beta: float

    @classmethod
    def of(cls, recipe: Recipe, plan: "Plan") -> "Descent":
        train = recipe.train
        rate = rate_of(train, plan.steps, plan.warmup_steps)
        objective = OBJECTIVES[train.objective]
        return cls(OPTIMIZERS[train.optimizer], rate, train.lora_plus_ratio, objective, train.beta)


class MeteredTrainer(SFTTrainer):
    """SFTTrainer that counts what it is fed, and takes a step whole and on a loss that is a number, or not at all.

    `has_begun` once the adapter is another than it was, `may_drop` while what is under way can be given up and done
    again: a step's passes, or an evaluation. What is left of the passes of one that `drops_step` is not run. `standing`
    is what the passes that come next will change.
    """

    control: TrainerControl
    open_step: OpenStep
    step_loss: torch.Tensor

    def __init__(
        self,
        learner: Learner,
        settings: SFTConfig,
        descent: Descent,
        rows: TrainingRows,
        going_on_from: Checkpoint | None,
        ranks: Ranks = ALONE,
    ):
        super().__init__(
            model=learner.loaded.model,
            args=settings,
            data_collator=collate,
            train_dataset=Dataset.from_list([dict(rows.packs[0])]),  # trl takes no other class, and looks at one row
            processing_class=learner.loaded.tokenizer,
            optimizer_cls_and_kwargs=descent.optimizer.made_with(settings.learning_rate, settings.max_steps),
        )
        self.accelerator.device_placement = False  # as in `_move_model_to_device`; batches go with `_prepare_inputs`
        self.remove_callback(PrinterCallback)
        self.train_dataset = rows.packs
        self.learner, self.places, self.going_on_from = learner, rows.places, going_on_from
        self.model_accepts_loss_kwargs |= descent.objective.learns_pairs  # or the share of a step is divided once more
        self.descent = descent
        self.order, self.shared = rows.order(settings.seed), SharedSteps(ranks)
        self.has_begun, self.may_drop, self.drops_step = False, True, False
        self.standing: tuple[Meter, Tensors, dict[str, Any]] | None = None
        self.start_clock(0.0)

    def _move_model_to_device(self, *args: Any, **kwargs: Any) -> None:
        """It is where it belongs; what of it is in host memory would be moved to the card with the rest."""

    def start_clock(self, seconds_before: float) -> None:
        """The time of training begins, `seconds_before` of which a run that goes on has behind it."""
        self.meter, self._began = Meter(), time.perf_counter() - seconds_before

    @property
    def seconds(self) -> float:
        """Since training began, breaks not counted."""
        return time.perf_counter() - self._began

    @property
    def step_under_way(self) -> str:
        return f"Step {self.state.global_step + 1}"

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.descent.ratio != 1:
            named = self.model.named_parameters()
            quicken(optimizer, [weight for name, weight in named if ".lora_B." in name], self.descent.ratio)
        keep_steps_whole(optimizer, self.learner.recovery, lambda: self.step_under_way)
        return optimizer

    def be_the_result(self) -> None:
        """Have the weights be what the optimizer has come to, where that is not where it takes gradients; the next pass
        has the others again."""
        inner: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        if hasattr(inner, "eval"):
            inner.eval()

    def optimizer_of_its_own(self) -> torch.optim.Optimizer:
        """One as training makes it, which the trainer does not keep; not paged, as bitsandbytes gives no paged memory
        back."""
        optimizer, self.optimizer = super().create_optimizer(), None
        if hasattr(optimizer, "is_paged"):
            optimizer.is_paged = False
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            scheduler: Any = super().create_scheduler(*args, **kwargs)
            scheduler.lr_lambdas = [self.descent.rate for _ in scheduler.lr_lambdas]
            wind(scheduler, 0)
        return self.lr_scheduler

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> DataOrder:
        return self.order

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of the next optimizer step."""
        start, waited_before = time.perf_counter(), self.shared.waited_seconds
        samples, counted = (
            self._share_of_step(*args) if self.shared.are_shared else super().get_batch_samples(*args, **kwargs)
        )
        if self.descent.objective.learns_pairs and not self.shared.are_shared:
            counted = self._pairs_in(samples)
        self.meter.wait_seconds += time.perf_counter() - start - (self.shared.waited_seconds - waited_before)
        self.begin_step(self.step_under_way)
        self.has_begun = True
        return samples, counted

    def _pairs_in(self, batches: list[Batch]) -> torch.Tensor:
        """(2,): what a loss of pairs is a mean over."""
        return torch.tensor(pair_loss.totals_of(batches), device=self.args.device)

    def _share_of_step(self, batches: Any, count: int, device: torch.device) -> tuple[list[Batch], Any]:
        """This rank's batches of the next optimizer step, and the labelled tokens, or pairs, of all ranks'.

        Of the `count` batches that one process would have, the last ones are empty.
        """
        step, ranks, size = self.state.global_step + 1, self.shared.ranks, self.args.per_device_train_batch_size
        rows = self.order.of_step(step, size, self.args.gradient_accumulation_steps)
        ours = in_batches(self.shared.ours_of(rows, self.train_dataset), self.train_dataset, size)
        counts = tokens_in(ours)
        totals = [*counts, counted_in(ours), *pair_loss.totals_of(ours)]
        tokens, trained_tokens, items, *pairs = self.shared.total(totals)
        self.meter.count(tokens, trained_tokens)
        draw_own_random(self.args.seed, step, ranks)
        self.shared.begin_passes(counts[0])
        takes_them = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        counted = pairs if self.descent.objective.learns_pairs else items
        return (
            ours + [empty_batch()] * (count - len(ours)),
            torch.tensor(counted, device=device) if takes_them else None,
        )

    def _get_num_items_in_batch(self, batches: list[Batch], device: torch.device) -> Any:
        """What a step's loss is divided by: all labels, by what they count for."""
        items = super()._get_num_items_in_batch(batches, device)
        is_weighted = any("token_weights" in batch for batch in batches)
        return torch.tensor(counted_in(batches), device=device) if is_weighted and items is not None else items

    def begin_step(self, where: str) -> None:
        """Have the passes that come belong to one optimizer step, called `where` in what is told of it."""
        self.open_step = OpenStep(self.learner.recovery, where, self.args.device, self.model.zero_grad)
        self.step_loss = torch.zeros((), device=self.args.device)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The summed loss over tokens, or pairs, of the whole step; trl's own where the head does not allow tiles."""
        if self.descent.objective.learns_pairs:
            loss = self._loss_of_pairs(inputs, num_items_in_batch)
        elif fused_cross_entropy.suits(self.model):
            output = model(**inputs, fused_loss=True)
            loss = output.nats / (output.tokens if num_items_in_batch is None else num_items_in_batch)
        else:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch, **kwargs)
        self.open_step.phase = "backward pass"
        return loss

    def _loss_of_pairs(self, inputs: dict[str, Any], totals: torch.Tensor | None) -> torch.Tensor:
        pairs = pair_loss.pairs_of(self.model, inputs, self.descent.objective, self.learner.loaded.as_base)
        totals = self._pairs_in([inputs]) if totals is None else totals
        return pair_loss.loss_of(pairs, self.descent.objective, self.descent.beta, totals)

    def loss_of(self, batch: Batch) -> torch.Tensor:
        """The loss of a batch that is a step by itself."""
        with self.learner.loaded.autocast():
            return self.compute_loss(self.model, batch)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The batch's share of the step's loss, its gradient added; in pieces, and again, where memory asks for it.

        After the last batch of a step that is shared out, gradients and loss are those of all ranks.
        """
        if not self.shared.are_shared:
            self.meter.count(*tokens_in([inputs]))
        is_left_out = self.drops_step or is_empty(inputs)
        with self.learner.loaded.passes_together():
            loss = self.step_loss.new_zeros(()) if is_left_out else self._loss_added(model, inputs, num_items_in_batch)
        if self.shared.are_shared and self.accelerator.sync_gradients:
            self.step_loss = self.shared.add_up(list(trained_parameters(self.model)), self.step_loss)
        return loss

    def _loss_added(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None
    ) -> torch.Tensor:
        if num_items_in_batch is None:  # a model of the user's own that takes no such argument
            num_items_in_batch = torch.tensor(counted_in([inputs]))

        def run(piece: Batch) -> torch.Tensor:
            return super(MeteredTrainer, self).training_step(model, piece, num_items_in_batch)

        loss = self.open_step.add(inputs, run)
        self.step_loss += loss
        return loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """`inputs` on the device, with the labelled positions found before, as a card would have to be waited for."""
        if self.descent.objective.learns_pairs:
            inputs = pair_loss.laid_out(inputs, self.descent.objective)
        elif fused_cross_entropy.suits(self.model):
            inputs = {**inputs, "labelled": fused_cross_entropy.positions_before_labels(inputs["labels"])}
        return super()._prepare_inputs(inputs)

    def refuse_unless_finite(self, gradients: list[torch.Tensor]) -> None:
        """Raises TrainingDiverged before a step whose loss or gradient is no number; waits for the device once.

        With float16 the gradient scaler skips a step of such a gradient itself, and halves its scale.
        """
        norm = torch.nn.utils.get_total_norm(gradients).to(self.step_loss)
        loss_is_finite, gradient_is_finite = torch.stack([self.step_loss, norm]).isfinite().tolist()
        if not loss_is_finite:
            raise self.diverged("loss")
        if not gradient_is_finite and not self.args.fp16:
            raise self.diverged("gradient")

    def diverged(self, what: str) -> TrainingDiverged:
        """The refusal of a step whose loss or gradient is no number; names the rows that it was made of."""
        step = self.state.global_step + 1
        args = self.args
        rows = self.order.of_step(step, args.per_device_train_batch_size, args.gradient_accumulation_steps)
        places = self.places(rows)
        more = f" and {len(places) - SHOWN_PLACES:,} more" if len(places) > SHOWN_PLACES else ""
        named = f" It was made of {', '.join(places[:SHOWN_PLACES])}{more}." if places else ""
        return TrainingDiverged(
            f"Step {step}: the {what} is not a finite number, so the step was not taken.{named} The usual cause is a"
            f" learning rate that is too high (train.learning_rate is {args.learning_rate:g}); a tenth of it is a good"
            " next try."
        )

    # Evaluation and checkpoints are ours from here on: what the trainer would write and read are pickles.

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._note_standing()

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The held-out loss of a step, behind the loss of that step; the reporter measures it."""
        self._note_standing()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {})
        return {}

    def _note_standing(self) -> None:
        self.standing = (replace(self.meter), *take_random(self.args.device))
        self.may_drop = True

    def put_standing_back(self) -> None:
        """As it was after the last whole step, when the one after it was dropped."""
        if self.standing is not None:
            self.meter, *random = self.standing
            put_random_back(self.args.device, *random)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The saver writes one, in its callback."""

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The saver puts it back, when optimizer and schedule are there."""

    def _load_rng_state(self, *args: Any, **kwargs: Any) -> None:
        """Called once the batches of the first step are fetched, or before an epoch that begins."""
        assert self.going_on_from is not None, "nothing else is resumed"
        if self.shared.ranks.is_first:  # the others' follow from the step
            put_random_back(self.args.device, *self.going_on_from.random())
