"""A base quantised once: its weights in NF4 kept under "nf4" in the machine's `cache_dir`, and loaded from there.

The key of an entry follows from all that the bits follow from: the base's fingerprint, its config.json, the settings of
quantisation, what quantises (libraries, this code, the device), so that what is loaded is bit for bit what would be
made again. The files are those of bitsandbytes and transformers for a model in 4 bits; experts, which these leave in 16
bits, are kept in the same manner. While an entry is written, one file of it is in host memory at a time.
"""

import functools
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, PreTrainedModel

from qtune import accelerator, cache_dir
from qtune.memory import packed_experts
from qtune.memory.dealt_layers import Load, files_read_by
from qtune.model import fingerprint
from qtune.recipe import base_kind
from qtune.recipe.schema import Model
from qtune.units import MIB

KIND = "nf4"
LEAST_BYTES = 256 * MIB  # of weight files: a smaller base is quantised in a second or two
CODEBOOK = "quant_map"  # of bitsandbytes: beside every packed weight, and beside no other
FILE_BYTES = 256 * MIB  # about that much of a model in one file, and so in host memory while it is written
MAKERS = ("torch", "transformers", "bitsandbytes")
# Who changes how weights are read and packed makes other entries.
CODE = ("memory/nf4.py", "memory/packed_experts.py", "memory/expert_loading.py", "model/checkpoint.py")


@dataclass(frozen=True)
class Place:
    """Where a base in 4 bits is kept, or would be: the key of its entry, and what people call the base."""

    key: str
    name: str

    def find(self) -> Path | None:
        """The folder of the weights; None where there is none, or a broken one."""
        entry = cache_dir.find(KIND, self.key)
        return entry and entry[0]

    def keep(self, model: PreTrainedModel) -> None:
        """Keep `model`, just loaded and quantised; where that fails there is no entry."""
        has_room = cache_dir.make_room(sum(tensor.nbytes for _, tensor in _kept(model)))
        stage = cache_dir.new_folder(cache_dir.folder(KIND)) if has_room else None
        if stage is None:
            return
        with suppress(SafetensorError, OSError):
            _write(model, stage)
            cache_dir.keep(KIND, self.key, stage, self.name, {})
        shutil.rmtree(stage, ignore_errors=True)


def keeps(model: Model, file_bytes: int) -> bool:
    """Whether a base whose weight files have so many bytes is kept in 4 bits.

    Not where code of others runs: it may hold what no file of weights does.
    """
    is_wanted = model.quantization == "nf4" and not model.trust_remote_code and file_bytes >= LEAST_BYTES
    return is_wanted and cache_dir.root() is not None


def place_of(model: Model, folder: Path, device: str, quantization: BitsAndBytesConfig) -> Place | None:
    """The place of the base in `folder` as `model` asks for it; None where it is not kept."""
    if not keeps(model, sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())):
        return None
    where = torch.device(device)
    facts = [
        fingerprint.fingerprint(folder),
        (folder / base_kind.CONFIG).read_text(encoding="utf-8"),
        quantization.to_json_string(use_diff=False),
        [where.type, accelerator.capability(where)],
        [importlib.metadata.version(name) for name in MAKERS],
        _code_sha256(),
    ]
    return Place(hashlib.sha256(json.dumps(facts).encode()).hexdigest(), model.base)


@contextmanager
def weights_from(entry: Path, device: str, lives_on_host: Callable[[str], bool]) -> Iterator[None]:
    """Inside, `from_pretrained` with a 4-bit configuration takes the weights of an `entry` in place of the files'.

    transformers builds the model, ties and initialises as ever; the one step between that reads files is ours. Those of
    which `lives_on_host` holds stay in host memory, all others go to `device`, one at a time.
    """

    def load(original: Load, model: PreTrainedModel, _: Any, __: Any, *settings: Any, **others: Any) -> Any:
        loading, offloaded = original(model, {}, None, *settings, **others)  # of no files: all is missing
        missing = frozenset(loading.missing_keys)
        for name, weight in _weights_in(entry, lambda each: "cpu" if lives_on_host(each) else device, missing):
            put(model, name, weight)
            loading.missing_keys.discard(name)
        return loading, offloaded

    with files_read_by(load):
        yield


def _weights_in(
    entry: Path, place_of: Callable[[str], str], missing: frozenset[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and weight, where it belongs, of those in an entry that are `missing`."""
    index = base_kind.read_index(entry / base_kind.INDEX_NAME)["weight_map"]
    with ExitStack() as stack:
        files = {name: stack.enter_context(safe_open(entry / name, "pt")) for name in sorted(set(index.values()))}

        def read(name: str, device: str) -> torch.Tensor:
            tensor: torch.Tensor = files[index[name]].get_tensor(name)
            return tensor.clone() if device == "cpu" else tensor.to(device)  # a mapped file is in nobody's memory

        packed = {name.removesuffix(f".{CODEBOOK}") for name in index if name.endswith(f".{CODEBOOK}")}
        states = {name: [key for key in index if key.startswith(f"{name}.")] for name in packed}
        of_states = {key for keys in states.values() for key in keys}
        for name in index:
            if name in of_states or name not in missing:
                continue
            device = place_of(name)
            if name not in packed:
                yield name, read(name, device)
                continue
            state = {key.removeprefix(f"{name}."): read(key, device) for key in states[name]}
            yield name, Params4bit.from_prequantized(read(name, device), state, device=device)


def put(model: PreTrainedModel, name: str, weight: Any) -> None:
    """Set a parameter or buffer of `model`, and keep transformers from initialising it."""
    path, _, own_name = name.rpartition(".")
    module = model.get_submodule(path)
    if own_name not in module._buffers and not isinstance(weight, torch.nn.Parameter):
        weight = torch.nn.Parameter(weight, requires_grad=False)
    if isinstance(weight, Params4bit) and isinstance(module, Linear4bit):
        weight.module, module.quant_state = module, weight.quant_state
    weight._is_hf_initialized = True
    setattr(module, own_name, weight)


def _write(model: PreTrainedModel, folder: Path) -> None:
    """All weights of `model` as safetensors beside an index, as transformers reads them."""
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(_files(model)):
        name = f"model-{number:05}.safetensors"
        save_file({each: tensor.contiguous() for each, tensor in tensors.items()}, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / base_kind.INDEX_NAME).write_text(index, encoding="utf-8")


def _files(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    held: dict[str, torch.Tensor] = {}
    for name, tensor in _kept(model):
        held[name] = tensor
        if sum(each.nbytes for each in held.values()) >= FILE_BYTES:
            yield held
            held = {}
    yield held


def _kept(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """What a model is made of, by name: parameters, what a packed one is unpacked by, and buffers that are saved."""
    for name, parameter in model.named_parameters():
        yield name, parameter.data
        if packed_experts.is_packed(parameter):
            for key, value in parameter.quant_state.as_dict(packed=True).items():
                yield f"{name}.{key}", value
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}", buffer


@functools.cache
def _code_sha256() -> str:
    digest = hashlib.sha256()
    for name in CODE:
        digest.update((Path(__file__).parent.parent / name).read_bytes())
    return digest.hexdigest()
