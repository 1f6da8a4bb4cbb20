"""One base, one adapter, tensor by tensor: what a run's weights are once the adapter is folded in."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch.linalg import vector_norm
from transformers import AutoConfig

from qtune.deploy.delta import AdapterWeights
from qtune.deploy.folder import write_small_files
from qtune.deploy.shards import Checkpoint, Shard, TensorSpec, write_index, write_shard
from qtune.errors import MachineError, ModelError
from qtune.memory.device import find_device
from qtune.model import base
from qtune.recipe.schema import Model
from qtune.rundir import RunDir, read_json

Onto = Literal["original", "dequantised"]
DType = Literal["auto", "float16", "bfloat16", "float32"]

MAX_NAMED = 8  # tensors in one message


@dataclass(frozen=True)
class LayerChange:
    """How far an adapted weight moved, beside what quantising it had cost: Frobenius norms over the original weight's.

    `quantization_error_fraction` is None for a weight that was not quantised.
    """

    module: str
    change_fraction: float
    quantization_error_fraction: float | None


@dataclass(frozen=True)
class Fold:
    """Everything a merge reads, checked to belong together before a byte is written."""

    lock: dict[str, Any]
    model: Model
    checkpoint: Checkpoint
    adapter: AdapterWeights
    quantized: frozenset[str]
    dtype: torch.dtype | None
    device: str

    @classmethod
    def open(cls, run: RunDir, dtype: DType) -> "Fold":
        """Raises ModelError for another base than the run's, and for an adapter that does not fit it."""
        lock = read_json(run.lock)
        model = Model(**lock["model"])
        folder = base.base_folder(model)
        found, expected = base.fingerprint(folder), lock["base"]["sha256"]
        if found != expected:
            raise ModelError(
                f"{folder}: is not the base of {run.path}; its weights have SHA-256 {found}, and the run was trained on"
                f" {expected}. Put back the base the run names ({lock['base']['name']})."
            )
        return cls.beside(run, folder, dtype)

    @classmethod
    def beside(cls, run: RunDir, folder: Path, dtype: DType) -> "Fold":
        """The same for a base in `folder` that is taken for the run's, as hashing takes as long as reading it all."""
        lock = read_json(run.lock)
        model = Model(**lock["model"])
        checkpoint, adapter = Checkpoint.open(folder), AdapterWeights.read(run.adapter)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
        quantized = frozenset(lock["quantized_modules"])
        _refuse_misfit(run, adapter, checkpoint, quantized)
        _refuse_tied(run, adapter, checkpoint, config)
        given = None if dtype == "auto" else getattr(torch, dtype)
        return cls(lock, model, checkpoint, adapter, quantized, given, find_device().name)

    @property
    def weight_bytes(self) -> int:
        return sum(self.written(spec).bytes for spec in self.checkpoint.specs().values())

    @property
    def dtype_name(self) -> str:
        """The dtype most of the written bytes are in, as config.json spells it."""
        size: Counter[torch.dtype] = Counter()
        for spec in map(self.written, self.checkpoint.specs().values()):
            size[spec.dtype] += spec.bytes
        return str(size.most_common(1)[0][0]).removeprefix("torch.")

    def written(self, spec: TensorSpec) -> TensorSpec:
        """The tensor as it will be in the output."""
        return dataclasses.replace(spec, dtype=self.dtype) if self.dtype and spec.dtype.is_floating_point else spec

    def tensors(self, onto: Onto) -> Iterator[torch.Tensor]:
        """Every tensor of the checkpoint's `specs`, in their order, folded `onto` one base and not written."""
        for shard in self.checkpoint.shards:
            yield from self._merged(shard, onto, None, lambda name: None)

    def write(self, folder: Path, onto: Onto, tell: Callable[[str], None]) -> list[LayerChange]:
        """The whole output in the new `folder`, folded `onto` one base; every file is on the disk on return."""
        folder.mkdir()
        changes: list[LayerChange] = []
        try:
            for shard in self.checkpoint.shards:
                tensors = self._merged(shard, onto, changes, tell)
                write_shard(folder / shard.file_name, shard.metadata, map(self.written, shard.tensors), tensors)
            if self.checkpoint.index is not None:
                write_index(folder, self.checkpoint.index, self.weight_bytes)
            stop = self.lock["stop_token_ids"]
            write_small_files(self.checkpoint.folder, folder, self.model, stop, self.dtype_name)
        except OSError as fault:
            raise MachineError(f"{folder.parent.parent}: writing failed ({fault.strerror or fault}).") from None
        return changes

    def _merged(
        self, shard: Shard, onto: Onto, changes: list[LayerChange] | None, tell: Callable[[str], None]
    ) -> Iterator[torch.Tensor]:
        """The shard's tensors as they are to be written; what moved is added to `changes`, if they are wanted."""
        for spec in shard.tensors:
            yield self._finished(spec, self.checkpoint.tensor(shard, spec.name), onto, changes)
            tell(spec.name)

    def _finished(
        self, spec: TensorSpec, original: torch.Tensor, onto: Onto, changes: list[LayerChange] | None
    ) -> torch.Tensor:
        """One tensor in the dtype it is written in; what is not floating point goes through untouched."""
        if not spec.dtype.is_floating_point:
            return original
        merged = self._fold(spec.name, original, onto, changes).to(self.written(spec).dtype)
        _refuse_not_finite(spec, merged, original)
        return merged

    def _fold(self, name: str, original: torch.Tensor, onto: Onto, changes: list[LayerChange] | None) -> torch.Tensor:
        """One tensor with its part of the adapter; float32 where the adapter adds to it."""
        if name in self.adapter.replaced:
            return self.adapter.replaced[name]
        module = name.removesuffix(".weight")
        change = self.adapter.changes.get(module)
        if change is None:
            return self._as_held(module, original) if onto == "dequantised" else original
        original = original.to(self.device)
        if changes is None:
            return change.apply(self._as_held(module, original) if onto == "dequantised" else original)
        held = self._as_held(module, original)
        start = held if onto == "dequantised" else original
        merged = change.apply(start)
        changes.append(_layer_change(module, original, held if module in self.quantized else None, start, merged))
        return merged

    def _as_held(self, module: str, original: torch.Tensor) -> torch.Tensor:
        """A tensor as the run held it: in the compute dtype, and for a quantised weight through 4 bits and back.

        This is what transformers does on loading, so the values are the live model's bit for bit.
        """
        loaded = original.to(getattr(torch, self.lock["compute_dtype"]))
        return (
            restore_quantized(loaded.to(self.device), self.lock["quantization"]) if module in self.quantized else loaded
        )


def restore_quantized(weight: torch.Tensor, quantization: dict[str, Any]) -> torch.Tensor:
    """`weight` through 4 bits and back, in its own dtype; `quantization` is the lock's record of how.

    Blocks run over the flattened tensor, and with double quantisation all block scales share one offset, so a weight
    can only be restored whole.
    """
    packed, state = quantize_4bit(
        weight.contiguous(),
        blocksize=quantization["blocksize"],
        compress_statistics=quantization["double"],
        quant_type=quantization["type"],
        quant_storage=getattr(torch, quantization["quant_storage"]),
    )
    return dequantize_4bit(packed, state)


def _refuse_misfit(run: RunDir, adapter: AdapterWeights, checkpoint: Checkpoint, quantized: frozenset[str]) -> None:
    """Every tensor the merge is to change must be in the checkpoint under its module's name, in the right shape."""
    specs = checkpoint.specs()
    faults = [
        f"{name} {'has another shape' if name in specs else 'is not in it'}"
        for name, fits in (
            *((f"{module}.weight", change.fits) for module, change in adapter.changes.items()),
            *((name, tuple(tensor.shape).__eq__) for name, tensor in adapter.replaced.items()),
        )
        if name not in specs or not fits(specs[name].shape)
    ]
    faults += [f"{module}.weight is not in it" for module in sorted(quantized) if f"{module}.weight" not in specs]
    if faults:
        unique = list(dict.fromkeys(faults))
        more = f"; and {len(unique) - MAX_NAMED} more" if len(unique) > MAX_NAMED else ""
        raise ModelError(
            f"{run.adapter}: does not fit the checkpoint {checkpoint.folder}, and nothing was merged:"
            f" {'; '.join(unique[:MAX_NAMED])}{more}."
        )


def _refuse_tied(run: RunDir, adapter: AdapterWeights, checkpoint: Checkpoint, config: Any) -> None:
    """One tensor that is both embedding and head cannot hold a change to one of them.

    Peft leaves the other side unchanged, so folding the change in would move both.
    """
    if not getattr(config, "tie_word_embeddings", False):
        return
    specs = checkpoint.specs()
    touched = [*(f"{module}.weight" for module in adapter.changes), *adapter.replaced]
    shared = [name for name in touched if len(specs[name].shape) == 2 and specs[name].shape[0] == config.vocab_size]
    if shared:
        raise ModelError(
            f"{run.adapter}: changes {', '.join(shared)}, which this base shares between its embedding and its head"
            " (tie_word_embeddings), so it cannot be merged. Serve the adapter beside the base, or train other targets."
        )


def _refuse_not_finite(spec: TensorSpec, merged: torch.Tensor, original: torch.Tensor) -> None:
    if torch.isfinite(merged).all():
        return
    if not torch.isfinite(original).all():
        raise ModelError(f"{spec.name}: holds NaN or infinity in the base already. Download the base again.")
    hint = " Use --dtype bfloat16, which reaches further." if merged.dtype == torch.float16 else ""
    raise ModelError(f"{spec.name}: is not finite in {merged.dtype} once merged.{hint}")


def _layer_change(
    module: str, original: torch.Tensor, held: torch.Tensor | None, start: torch.Tensor, merged: torch.Tensor
) -> LayerChange:
    """All (O, I) on one device; `held` is the weight after 4 bits, None where it was not quantised."""
    size = float(vector_norm(original.float()))
    error = None if held is None else _share(held, original, size)
    return LayerChange(module, _share(merged, start, size), error)


def _share(after: torch.Tensor, before: torch.Tensor, size: float) -> float:
    return float(vector_norm(after.float() - before.float())) / size if size else 0.0
