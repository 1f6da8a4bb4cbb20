"""One base, one adapter, tensor by tensor: what a run's weights are once the adapter is folded in."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any, Literal

import torch

from qtune import __version__, atomic_files
from qtune.errors import ModelError
from qtune.hardware import find_device
from qtune.lock import Lock
from qtune.merge.checkpoint_names import CheckpointNames, Place, Places
from qtune.merge.config_files import write_small_files
from qtune.merge.lora_delta import (
    CONFIG_NAME,
    AdapterWeights,
    Delta,
    LoraDelta,
    PiledDelta,
    RowsDelta,
    StackedDelta,
    weights_path,
)
from qtune.merge.merged_tensor import Job, Part, Weight
from qtune.merge.nf4_round_trip import Rows, piled, restored_experts, restored_rows
from qtune.merge.parallel_writer import in_order
from qtune.merge.safetensors_shards import write_index, write_shard
from qtune.merge.weight_change import LayerChange, Movement
from qtune.model import base, fingerprint
from qtune.model.checkpoint import BaseCheckpoint, Shard, TensorSpec
from qtune.model.open_model import model_of
from qtune.recipe.schema import Model
from qtune.rundir import RunDir

Onto = Literal["original", "dequantised"]
DType = Literal["auto", "float16", "bfloat16", "float32"]

MAX_NAMED = 8  # tensors in one message
RECENT_STACKS = 2  # what goes into a layer's activation, and what comes out: files have the experts' one by one


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
    names: CheckpointNames
    quantized: frozenset[str]
    dtype: torch.dtype | None
    device: str
    recent: dict[str, Rows] = field(default_factory=dict)  # experts that were restored a moment ago

    @classmethod
    def open(cls, run: RunDir, dtype: DType, folder: Path | None = None) -> "Fold":
        """With the base in `folder`, or where the run's recipe has it.

        Raises ModelError for an adapter that does not fit it, and where it is another base at a glance.
        """
        lock, model = run.read_lock(), model_of(run)
        folder = folder or base.base_folder(model, is_text_alone=False)
        fingerprint.refuse_other_base(run, folder)
        checkpoint = BaseCheckpoint.open(folder)
        names = checkpoint_names(model, checkpoint)
        adapter = AdapterWeights.read(run.adapter, names.stacks)
        config = base.config_in(folder, model)
        quantized = frozenset(lock.quantized_modules)
        _refuse_misfit(run, adapter, checkpoint, names, quantized)
        _refuse_tied(run, adapter, names, config)
        given = None if dtype == "auto" else getattr(torch, dtype)
        return cls(lock, model, checkpoint, adapter, names, quantized, given, find_device().name)

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
        for spec in map(self.written, self.checkpoint.text_specs().values()):
            size[spec.dtype] += spec.bytes
        return str(size.most_common(1)[0][0]).removeprefix("torch.")

    def written(self, spec: TensorSpec) -> TensorSpec:
        """The tensor as it will be in the output; what is not the text model's stays as it is."""
        is_cast = spec.dtype.is_floating_point and self.checkpoint.text.name(spec.name) is not None
        return dataclasses.replace(spec, dtype=self.dtype) if self.dtype and is_cast else spec

    def jobs(
        self, shard: Shard, name: str, onto: Onto, order: torch.Tensor | None = None, is_measured: bool = False
    ) -> Iterator[Job]:
        """What makes one tensor of the checkpoint, folded `onto` one base, a few rows each and in their order.

        `order` says which row goes where, if not as they are. What is not floating point, or not the text model's, goes
        untouched.
        `is_measured` is for how far an adapted weight moves.
        """
        original = self.checkpoint.tensor(shard, name)
        if self.checkpoint.text.name(name) is not None and original.dtype.is_floating_point:
            if self.names.is_transposed(name):
                assert order is None, "no format that wants rows in another order has such weights"
                return iter([partial(self._transposed, name, original, onto, is_measured)])
            return self._weight(name, original, onto, is_measured).jobs(order)
        return iter([lambda: Part(name, original)])

    def _transposed(self, name: str, original: torch.Tensor, onto: Onto, is_measured: bool) -> Part:
        """The whole of a weight (I, O), of which a linear has the other way about."""
        parts = [job() for job in self._weight(name, original.t().contiguous(), onto, is_measured).jobs()]
        movements = [part.movement for part in parts if part.movement is not None]
        moved = sum(movements[1:], movements[0]) if movements else None
        return Part(name, torch.cat([part.rows for part in parts]).t().contiguous(), moved)

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
        dtype = self.written(self.checkpoint.spec_by_name[name]).dtype
        places = self.names.of_tensor(name)
        if any(place.tensor in self.adapter.replaced for place in places):
            replaced = torch.cat([place.of(self.adapter.replaced[place.tensor]) for place in places])
            return Weight(name, _as_matrix(replaced), dtype)
        weight = _as_matrix(original)
        change = self._change(places)
        is_measured, is_quantized = is_measured and change is not None, any(map(self._is_quantized, places))
        if change is not None or (onto == "dequantised" and is_quantized):
            weight = weight.to(self.device)
        held = self._held(places, weight) if onto == "dequantised" or (is_measured and is_quantized) else None
        start = held if onto == "dequantised" else None
        before = held if is_quantized and not self._is_given else None
        return Weight(name, weight, dtype, start, change, before, is_measured)

    def _change(self, places: Places) -> Delta | None:
        """What the adapter does to a tensor of the checkpoint."""
        changes = [self._change_of(place) for place in places]
        if len(changes) == 1 or not any(changes):
            return changes[0]
        single = tuple(change if isinstance(change, LoraDelta) else None for change in changes)
        return PiledDelta(single, tuple(self.names.shapes[place.tensor][0] for place in places))

    def _change_of(self, place: Place) -> LoraDelta | StackedDelta | RowsDelta | None:
        change = self.adapter.of_tensor(place.tensor)
        if change is None or place.is_whole:
            return change
        if isinstance(change, StackedDelta):
            assert place.expert is not None
            return change.of_expert(place.expert, place.rows)
        return change.of_rows(place.rows)

    @property
    def _is_given(self) -> bool:
        """Whether the checkpoint has in 4 bits what the run had, so that nothing was rounded."""
        return self.lock.quantization is not None and self.lock.quantization.is_given

    def _is_quantized(self, place: Place) -> bool:
        return place.tensor in self.quantized or place.tensor.removesuffix(".weight") in self.quantized

    def _layer_change(self, name: str, moved: Movement) -> LayerChange:
        is_rounded = not self._is_given and any(map(self._is_quantized, self.names.of_tensor(name)))
        return moved.of(name.removesuffix(".weight"), is_rounded)

    def _held(self, places: Places, weight: torch.Tensor) -> Rows:
        """Rows of a weight as the run held it: in the compute dtype, and a quantised one through 4 bits and back.

        This is what transformers does on loading, so the values are the live model's bit for bit.
        """
        if len(places) == 1:
            return self._held_part(places[0], weight)
        heights = [self.names.shapes[place.tensor][0] for place in places]
        each = zip(places, weight.split(heights), strict=True)
        return piled([self._held_part(place, own) for place, own in each], heights)

    def _held_part(self, place: Place, weight: torch.Tensor) -> Rows:
        dtype = getattr(torch, self.lock.compute_dtype)
        if place.tensor in self.quantized:
            experts = self._experts(place.tensor)
            if place.expert is None:
                return lambda rows: experts(rows).flatten(1)
            return experts(slice(place.expert, place.expert + 1))[0][place.rows].__getitem__
        if self._is_quantized(place) and not self._is_given:
            assert self.lock.quantization is not None, "there are quantised modules"
            return restored_rows(weight, dtype, self.lock.quantization)
        return lambda rows: weight[rows].to(dtype)

    def _experts(self, tensor: str) -> Rows:
        """Experts (G, O, I) of a parameter in 4 bits. The last few are kept, as its tensors follow each other in a
        checkpoint."""
        if tensor not in self.recent:
            while len(self.recent) >= RECENT_STACKS:
                del self.recent[next(iter(self.recent))]
            assert self.lock.quantization is not None, "there are quantised experts"
            shape = self.names.shapes[tensor]
            self.recent[tensor] = restored_experts(self._matrices(tensor), shape, self.lock.quantization)
        return self.recent[tensor]

    def _matrices(self, tensor: str) -> Iterator[torch.Tensor]:
        """The matrices of a parameter's experts, as they were before they were quantised."""
        dtype = getattr(torch, self.lock.compute_dtype)
        by_expert: dict[int | None, list[str]] = {}
        for stored in self.names.stored_of(tensor):
            by_expert.setdefault(self.names.of_tensor(stored)[0].expert, []).append(stored)
        for expert, names in by_expert.items():
            whole = torch.cat([self.checkpoint.called(name) for name in names])
            for matrix in [whole] if expert is not None else whole:
                yield matrix.to(self.device, dtype)


def checkpoint_names(model: Model, checkpoint: BaseCheckpoint) -> CheckpointNames:
    """Where the tensors of `checkpoint` are in the model; where they say, if it cannot be made without weights."""
    shapes = {own: spec.shape for own, spec in checkpoint.text_specs().items()}
    try:
        empty = base.without_weights(model.model_copy(update={"base": str(checkpoint.folder)}))
    except Exception:  # code of a stranger may want weights
        if not model.trust_remote_code:
            raise
        return CheckpointNames({}, shapes, {})
    return CheckpointNames.of(empty, shapes).called(checkpoint.stored_as)


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """(O, I) of any shape; a vector as rows of one."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.view(-1, 1)


def _refuse_misfit(
    run: RunDir,
    adapter: AdapterWeights,
    checkpoint: BaseCheckpoint,
    names: CheckpointNames,
    quantized: frozenset[str],
) -> None:
    """Every tensor the merge is to change must be in the checkpoint, by its own or another name, in the right shape."""
    specs = checkpoint.specs()
    stored = {place.tensor: name for name in specs for place in names.of_tensor(name)}
    known = {
        **names.shapes,
        **{tensor: specs[name].shape for tensor, name in stored.items() if names.of_tensor(name) == (Place(tensor),)},
    }
    known |= {tensor: tuple(reversed(known[tensor])) for tensor in names.transposed & stored.keys()}
    faults = [
        f"{name} {'has another shape' if name in stored else 'is not in it'}"
        for name, fits in (
            *((f"{module}.weight", change.fits) for module, change in adapter.changes.items()),
            *((name, change.fits) for name, change in adapter.stacked.items()),
            *((name, change.fits) for name, change in adapter.rows.items()),
            *((name, tuple(tensor.shape).__eq__) for name, tensor in adapter.replaced.items()),
        )
        if name not in stored or not fits(known[name])
    ]
    needed = [name if name in stored else f"{name}.weight" for name in sorted(quantized)]
    faults += [f"{name} is not in it" for name in needed if name not in stored]
    if faults:
        unique = list(dict.fromkeys(faults))
        more = f"; and {len(unique) - MAX_NAMED} more" if len(unique) > MAX_NAMED else ""
        raise ModelError(
            f"{run.adapter}: does not fit the checkpoint {checkpoint.folder}, and nothing was merged:"
            f" {'; '.join(unique[:MAX_NAMED])}{more}."
        )


def _refuse_tied(run: RunDir, adapter: AdapterWeights, names: CheckpointNames, config: Any) -> None:
    """One tensor that is both embedding and head cannot hold a change to one of them.

    Peft leaves the other side unchanged, so folding the change in would move both.
    """
    if not getattr(config, "tie_word_embeddings", False):
        return
    touched = [*(f"{module}.weight" for module in adapter.changes), *adapter.replaced]
    shapes = {name: names.shapes.get(name, ()) for name in touched}
    shared = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == config.vocab_size]
    if shared:
        raise ModelError(
            f"{run.adapter}: changes {', '.join(shared)}, which this base shares between its embedding and its head"
            " (tie_word_embeddings), so it cannot be merged. Serve the adapter beside the base, or train other targets."
        )
