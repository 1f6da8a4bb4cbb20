"""One base, one adapter, tensor by tensor: what a run's weights are once the adapter is folded in."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig

from qtune import __version__, sealed
from qtune.deploy.delta import CONFIG_NAME, AdapterWeights, weights_path
from qtune.deploy.folder import write_small_files
from qtune.deploy.movement import LayerChange, Movement
from qtune.deploy.round_trip import Rows, restored_rows, rows_at_once
from qtune.deploy.shards import Checkpoint, Shard, TensorSpec, write_index, write_shard
from qtune.errors import ModelError
from qtune.memory.device import find_device
from qtune.model import base
from qtune.recipe.schema import Model
from qtune.rundir import RunDir, read_json

Onto = Literal["original", "dequantised"]
DType = Literal["auto", "float16", "bfloat16", "float32"]

MAX_NAMED = 8  # tensors in one message


@dataclass(frozen=True)
class WrittenShard:
    """A finished file of weights: the SHA-256 of its bytes, and how far the layers in it moved."""

    sha256: str
    layers: tuple[LayerChange, ...]


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

    def without_adapter(self) -> "Fold":
        """The base alone."""
        return dataclasses.replace(self, adapter=AdapterWeights({}, {}))

    def made_from(self, run: RunDir) -> dict[str, str]:
        """All that decides a merge's bytes but the base it is folded into, to tell one merge from another."""
        return {
            "base_sha256": self.lock["base"]["sha256"],
            "adapter_sha256": sealed.digest_of(weights_path(run.adapter)),
            "adapter_config_sha256": sealed.digest_of(run.adapter / CONFIG_NAME),
            "lock_sha256": sealed.digest_of(run.lock),
            "dtype": str(self.dtype),
            "device": self.device,
            "qtune": __version__,
            **{package: version(package) for package in ("torch", "bitsandbytes")},
        }

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
            for spec in shard.tensors:
                yield _whole(self.written(spec), self._parts(shard, spec, onto, None))

    def write_shard(self, folder: Path, shard: Shard, onto: Onto, tell: Callable[[str], None]) -> WrittenShard:
        """One file of weights in `folder`, folded `onto` one base; it is on the disk on return."""
        layers: list[LayerChange] = []

        def tensors() -> Iterator[Iterator[torch.Tensor]]:
            for spec in shard.tensors:
                yield self._parts(shard, spec, onto, layers)
                tell(spec.name)

        with _one_thread():
            sha256 = write_shard(folder / shard.file_name, shard.metadata, map(self.written, shard.tensors), tensors())
        return WrittenShard(sha256, tuple(layers))

    def write_small_files(self, folder: Path) -> None:
        """What stands beside the weights: the shards' index, configuration, tokenizer, template, licence."""
        if self.checkpoint.index is not None:
            write_index(folder, self.checkpoint.index, self.weight_bytes)
        stop = self.lock["stop_token_ids"]
        write_small_files(self.checkpoint.folder, folder, self.model, stop, self.dtype_name)

    def _parts(
        self, shard: Shard, spec: TensorSpec, onto: Onto, layers: list[LayerChange] | None
    ) -> Iterator[torch.Tensor]:
        """One tensor in the dtype it is written in, some rows at a time; what is not floating point goes untouched.

        How far an adapted weight moved is added to `layers`, if that is wanted.
        """
        original = self.checkpoint.tensor(shard, spec.name)
        if not spec.dtype.is_floating_point:
            yield original
            return
        for part in self._folded(spec.name, original, onto, layers):
            merged = part.to(self.written(spec).dtype)
            _refuse_not_finite(spec, merged, original)
            yield merged

    def _folded(
        self, name: str, original: torch.Tensor, onto: Onto, layers: list[LayerChange] | None
    ) -> Iterator[torch.Tensor]:
        """Rows of one tensor with their part of the adapter; float32 where the adapter adds to them."""
        if name in self.adapter.replaced:
            yield self.adapter.replaced[name]
            return
        module = name.removesuffix(".weight")
        change = self.adapter.changes.get(module)
        weight = original.flatten(1) if original.dim() > 1 else original.view(1, -1)
        is_compared = change is not None and layers is not None and module in self.quantized
        if change is not None or (onto == "dequantised" and module in self.quantized):
            weight = weight.to(self.device)
        held = self._held(module, weight) if onto == "dequantised" or is_compared else weight.__getitem__
        if change is None:
            yield from map(held, _rows(weight))
            return
        moved = Movement()
        for rows in _rows(weight):
            as_held = held(rows)
            start = as_held if onto == "dequantised" else weight[rows]
            merged = change.apply(start, rows)
            if layers is not None:
                moved.add(weight[rows], as_held if is_compared else None, start, merged)
            yield merged
        if layers is not None:
            layers.append(moved.of(module, is_compared))

    def _held(self, module: str, weight: torch.Tensor) -> Rows:
        """Rows of a weight as the run held it: in the compute dtype, and a quantised one through 4 bits and back.

        This is what transformers does on loading, so the values are the live model's bit for bit.
        """
        dtype = getattr(torch, self.lock["compute_dtype"])
        if module in self.quantized:
            return restored_rows(weight, dtype, self.lock["quantization"])
        return lambda rows: weight[rows].to(dtype)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Parts are too small to be shared out: threads would wait for each other at every operation, and on a busy machine
    that took ten times as long. Hashing and writing have a thread of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rows(weight: torch.Tensor) -> Iterator[slice]:
    """The rows of a matrix, in parts that are worked on together."""
    count, at_once = len(weight), rows_at_once(weight)
    return (slice(start, min(start + at_once, count)) for start in range(0, count, at_once))


def _whole(spec: TensorSpec, parts: Iterator[torch.Tensor]) -> torch.Tensor:
    """A tensor in host memory, from the parts that follow each other in it."""
    whole = torch.empty(spec.shape, dtype=spec.dtype)
    flat, start = whole.view(-1), 0
    for part in parts:
        flat[start : start + part.numel()] = part.reshape(-1)
        start += part.numel()
    return whole


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
    """The sum of what is finite may overflow, of anything else it is never finite: it is asked first, being faster."""
    if torch.isfinite(merged.sum()) or torch.isfinite(merged).all():
        return
    if not torch.isfinite(original).all():
        raise ModelError(f"{spec.name}: holds NaN or infinity in the base already. Download the base again.")
    hint = " Use --dtype bfloat16, which reaches further." if merged.dtype == torch.float16 else ""
    raise ModelError(f"{spec.name}: is not finite in {merged.dtype} once merged.{hint}")
