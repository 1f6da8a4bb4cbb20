"""Runs as training leaves them, made by hand: a base, an adapter with a random B that matters, and the lock."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from qtune import __version__
from qtune.lock import Lock, LockedBase, Quantization
from qtune.model import adapter, base, fingerprint
from qtune.model.tokenizer import load_tokenizer
from qtune.recipe.schema import Model
from qtune.rundir import RunDir, write_json

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_run(
    path: Path,
    folder: Path,
    lora: dict[str, Any] | None = None,
    compute_dtype: str = "bfloat16",
    strength: float = 0.05,
    stop_token_ids: tuple[int, ...] | None = None,
    **model_settings: Any,
) -> RunDir:
    """A run folder at `path` for the base in `folder`; B is normal with standard deviation `strength`.

    It stops at the tokenizer's end of sequence unless told otherwise.
    """
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **(lora or {})}
    model = Model(base=str(folder), **model_settings)

    def attach(loaded: PreTrainedModel) -> PeftModel:
        return get_peft_model(loaded, LoraConfig(**settings))

    return kept_run(path, model, attach, compute_dtype, strength, stop_token_ids)


def kept_run(
    path: Path,
    model: Model,
    attach: Callable[[PreTrainedModel], PeftModel],
    compute_dtype: str = "bfloat16",
    strength: float = 0.05,
    stop_token_ids: tuple[int, ...] | None = None,
) -> RunDir:
    """The same, of the base that `model` names, with the adapter that is attached to it."""
    folder = Path(model.base)
    loaded = base.load_base(model, "cpu", compute_dtype)
    quantized = list(base.quantized_modules(loaded))
    torch.manual_seed(1)
    tuned = attach(loaded)
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=strength)
        if ".modules_to_save." in name:
            parameter.data += strength * torch.randn_like(parameter)
        if ".lora_magnitude_vector." in name:
            parameter.data *= 1 + 0.1 * torch.randn_like(parameter)
    run = RunDir.create(path, "", {})
    adapter.save(tuned, run.adapter, model.base)
    run.write_lock(
        Lock(
            name=None,
            base=LockedBase(model.base, str(folder), fingerprint.fingerprint(folder), fingerprint.glance(folder)),
            model=model.model_dump(mode="json"),
            recipe={"model": model.model_dump(mode="json")},
            quantized_modules=tuple(quantized),
            quantization=Quantization("nf4", model.double_quantization) if quantized else None,
            device="cpu",
            compute_dtype=compute_dtype,
            data_sha256="0" * 64,
            template_sha256=None,
            tokenizer_sha256=None,
            stop_token_ids=stop_token_ids or _ends(folder, model),
            seed=None,
            versions={"qtune": __version__},
        )
    )
    write_json(run.plan, {"techniques": {}})
    return run


def _ends(folder: Path, model: Model) -> tuple[int, ...]:
    """What ends an answer, where the base has a tokenizer to say it."""
    return (load_tokenizer(model).eos_token_id,) if (folder / "tokenizer.json").is_file() else ()


def token_rows(vocabulary: int = 262, rows: int = 6, tokens: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(6, vocabulary, (tokens,), generator=generator).tolist() for _ in range(rows)]


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
