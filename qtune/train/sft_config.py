"""Plan -> SFTConfig: the only file that knows how trl and transformers spell their settings."""

from pathlib import Path
from typing import TYPE_CHECKING

from trl import SFTConfig

from qtune.recipe.schema import Recipe
from qtune.train.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from qtune.plan.plan import Plan

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def sft_config(recipe: Recipe, plan: "Plan", folder: Path) -> SFTConfig:
    """Settings for rows that are tokenised, cut and packed already; trl prepares, saves and prints nothing itself."""
    train = recipe.train
    return SFTConfig(
        output_dir=str(folder.absolute()),  # wandb takes a name that is the folder as well for a slip
        max_steps=plan.steps,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.gradient_accumulation,
        learning_rate=train.learning_rate,
        lr_scheduler_type=SCHEDULES[train.schedule],
        warmup_steps=plan.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=OPTIMIZERS[train.optimizer].made_by,
        gradient_checkpointing=False,  # ours is in memory.layers
        bf16=plan.compute_dtype == "bfloat16",
        fp16=plan.compute_dtype == "float16",
        use_cpu=not plan.device.is_cuda,
        seed=train.seed,
        data_seed=train.seed,
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="no",
        prediction_loss_only=True,
        save_strategy="no",
        report_to=[],  # train.tracking tells them
        run_name=folder.name,
        project="qtune",
        disable_tqdm=True,
        dataloader_pin_memory=plan.device.is_cuda,
        remove_unused_columns=False,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
