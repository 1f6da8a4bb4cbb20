"""One base, one adapter, tensor by tensor: what a run's weights are once the adapter is folded in."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any, Literal

import torch
from transformers import AutoConfig

from qtune import __version__, atomic_files
from qtune.errors import ModelError
from qtune.hardware import find_device
from qtune.lock import Lock
from qtune.merge.config_files import write_small_files
from qtune.merge.lora_delta import CONFIG_NAME, AdapterWeights, weights_path
from qtune.merge.merged_tensor import Job, Part, Weight
from qtune.merge.nf4_round_trip import Rows, restored_rows
from qtune.merge.parallel_writer import in_order
from qtune.merge.safetensors_shards import BaseCheckpoint, Shard, TensorSpec, write_index, write_shard
from qtune.merge.weight_change import LayerChange, Movement
from qtune.model import base, fingerprint
from qtune.model.open_model import model_of
from qtune.recipe.schema import Model
from qtune.rundir import RunDir

Onto = Literal["original", "dequantised"]
DType = Literal["auto", "float16", "bfloat16", "float32"]

MAX_NAMED = 8  # tensors in one message


@dataclass(frozen=True)
class WrittenShard:
    """A finished file of weights at a glance, and how far the layers in it moved."""

    glance_sha256: str
    layers: tuple[LayerChange, ...]


@dataclass(frozen=True)
class Fold:
    """Everything a merge reads, checked to belong together before a byte is written."""

    lock: Lock
    model: Model
    checkpoint: BaseCheckpoint
    adapter: AdapterWeights
    quantized: frozenset[str]
    dtype: torch.dtype | None
    device: str

    @classmethod
    def open(cls, run: RunDir, dtype: DType, folder: Path | None = None) -> "Fold":
        """With the base in `folder`, or where the run's recipe has it.

        Raises ModelError for an adapter that does not fit it, and where it is another base at a glance.
        """
        lock, model = run.read_lock(), model_of(run)
        folder = folder or base.base_folder(model)
        fingerprint.refuse_other_base(run, folder)
        checkpoint, adapter = BaseCheckpoint.open(folder), AdapterWeights.read(run.adapter)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
        quantized = frozenset(lock.quantized_modules)
        _refuse_misfit(run, adapter, checkpoint, quantized)
        _refuse_tied(run, adapter, checkpoint, config)
        given = None if dtype == "auto" else getattr(torch, dtype)
        return cls(lock, model, checkpoint, adapter, quantized, given, find_device().name)

    @contextmanager
    def proving_base(self, tell: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
        """Hash the base beside what the block does with it, so that it is read from the disk once; yields a `tell`.

        Raises ModelError for another base than the run's: in that `tell` as soon as it is known, and at the latest when
        the block ends, which waits for it.
        """
        stop = Event()
        with ThreadPoolExecutor(max_workers=1) as beside:
            found = beside.submit(fingerprint.fingerprint, self.checkpoint.folder, stop)

            def told(name: str) -> None:
                if found.done():
                    self._refuse_other_base(found.result())
                tell(name)

            try:
                yield told
            except BaseException:
                stop.set()
                raise
            self._refuse_other_base(found.result())

    def _refuse_other_base(self, found: str) -> None:
        then = self.lock.base
        if found != then.sha256:
            raise ModelError(
                f"{self.checkpoint.folder}: is not the base of the run; its weights have SHA-256 {found}, and the run"
                f" was trained on {then.sha256}. Put back the base the run names ({then.name})."
            )

    def without_adapter(self) -> "Fold":
        """The base alone."""
        return dataclasses.replace(self, adapter=AdapterWeights({}, {}))

    def made_from(self, run: RunDir) -> dict[str, str]:
        """All that decides a merge's bytes but the base it is folded into, to tell one merge from another."""
        return {
            "base_glance": fingerprint.glance(self.checkpoint.folder),
            "adapter_sha256": atomic_files.digest_of(weights_path(run.adapter)),
            "adapter_config_sha256": atomic_files.digest_of(run.adapter / CONFIG_NAME),
            "lock_sha256": atomic_files.digest_of(run.lock),
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

    def jobs(
        self, shard: Shard, name: str, onto: Onto, order: torch.Tensor | None = None, is_measured: bool = False
    ) -> Iterator[Job]:
        """What makes one tensor of the checkpoint, folded `onto` one base, a few rows each and in their order.

        `order` says which row goes where, if not as they are. What is not floating point goes untouched.
        `is_measured` is for how far an adapted weight moves.
        """
        original = self.checkpoint.tensor(shard, name)
        if original.dtype.is_floating_point:
            return self._weight(name, original, onto, is_measured).jobs(order)
        return iter([lambda: Part(name, original)])

    def write_shard(self, folder: Path, shard: Shard, onto: Onto, tell: Callable[[str], None]) -> WrittenShard:
        """One file of weights in `folder`, folded `onto` one base; it is on the disk on return."""
        moved: dict[str, Movement] = {}

        def jobs() -> Iterator[Job]:
            for spec in shard.tensors:
                yield from self.jobs(shard, spec.name, onto, is_measured=True)
                tell(spec.name)

        def rows() -> Iterator[torch.Tensor]:
            for part in in_order(jobs()):
                if part.movement is not None:
                    moved[part.name] = moved.get(part.name, Movement()) + part.movement
                yield part.rows

        path = folder / shard.file_name
        write_shard(path, shard.metadata, map(self.written, shard.tensors), rows())
        layers = tuple(self._layer_change(name, movement) for name, movement in moved.items())
        return WrittenShard(atomic_files.glance_at(path), layers)

    def write_small_files(self, folder: Path) -> None:
        """What stands beside the weights: the shards' index, configuration, tokenizer, template, licence."""
        if self.checkpoint.index is not None:
            write_index(folder, self.checkpoint.index, self.weight_bytes)
        stop = self.lock.stop_token_ids
        write_small_files(self.checkpoint.folder, folder, self.model, stop, self.dtype_name)

    def _weight(self, name: str, original: torch.Tensor, onto: Onto, is_measured: bool) -> Weight:
        """A tensor that is floating point, and all that its rows are made of."""
        dtype = self.dtype or original.dtype
        if name in self.adapter.replaced:
            replaced = _as_matrix(self.adapter.replaced[name])
            return Weight(name, replaced, dtype)
        module, weight = name.removesuffix(".weight"), _as_matrix(original)
        change = self.adapter.changes.get(module)
        is_measured, is_quantized = is_measured and change is not None, module in self.quantized
        if change is not None or (onto == "dequantised" and is_quantized):
            weight = weight.to(self.device)
        held = self._held(module, weight) if onto == "dequantised" or (is_measured and is_quantized) else None
        start = held if onto == "dequantised" else None
        return Weight(name, weight, dtype, start, change, held if is_quantized else None, is_measured)

    def _layer_change(self, name: str, moved: Movement) -> LayerChange:
        module = name.removesuffix(".weight")
        return moved.of(module, module in self.quantized)

    def _held(self, module: str, weight: torch.Tensor) -> Rows:
        """Rows of a weight as the run held it: in the compute dtype, and a quantised one through 4 bits and back.

        This is what transformers does on loading, so the values are the live model's bit for bit.
        """
        dtype = getattr(torch, self.lock.compute_dtype)
        if module in self.quantized:
            assert self.lock.quantization is not None, "there are quantised modules"
            return restored_rows(weight, dtype, self.lock.quantization)
        return lambda rows: weight[rows].to(dtype)


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """(O, I) of any shape; a vector as rows of one."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.view(-1, 1)


def _refuse_misfit(run: RunDir, adapter: AdapterWeights, checkpoint: BaseCheckpoint, quantized: frozenset[str]) -> None:
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


def _refuse_tied(run: RunDir, adapter: AdapterWeights, checkpoint: BaseCheckpoint, config: Any) -> None:
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
