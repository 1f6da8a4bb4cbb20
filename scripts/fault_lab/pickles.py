"""S1: a pickle that does something when it is opened, everywhere that a library might open it."""

import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fault_lab import stage
from qtune.errors import QtuneError
from qtune.model import adapter, base
from qtune.model.tokenizer import load_tokenizer
from qtune.recipe.base_kind import ADAPTER_CONFIG, INDEX_NAME, SINGLE_NAME
from qtune.recipe.schema import Lora, Model
from qtune.train import checkpoint_files

WHAT = "evil pickles in base, adapter, tokenizer and checkpoint folders are never opened"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.pkl", "special_tokens_map.json")
STRAY = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "optimizer.bin")
CHECKPOINT_FILES = (checkpoint_files.OPTIMIZER, checkpoint_files.RANDOM, checkpoint_files.STATE, checkpoint_files.LOCK)


class Evil:
    """Makes the folder `mark` when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def run(cases: int, seed: int, folder: Path) -> Iterator[str | None]:
    """One planted pickle a case; the attack is to read the folder in every way qtune does."""
    dice = random.Random(seed)
    clean = stage.make_base(folder / "clean")
    loaded = base.load_base(Model(base=str(clean)), "cpu", "float32")
    adapter.save(adapter.attach(loaded, Lora(rank=2), seed=0), folder / "adapter", str(clean))
    attacks = (in_base, in_tokenizer, by_index, as_adapter_of_base, in_adapter, in_checkpoint)
    for case in range(cases):
        place, mark = folder / f"case-{case}", folder / f"opened-{case}"
        content = evil_bytes(dice, mark)
        attack = attacks[case % len(attacks)]
        told = attack(dice, content, place, folder)
        yield f"{attack.__name__} ({told}): the pickle was opened" if mark.exists() else None
        shutil.rmtree(place)


def evil_bytes(dice: random.Random, mark: Path) -> bytes:
    """A plain pickle of any protocol, or one in a file of torch's, old or new."""
    kind = dice.randrange(8)
    if kind < 6:
        return pickle.dumps({"weight": Evil(mark)}, protocol=kind)
    buffer = io.BytesIO()
    torch.save({"weight": Evil(mark)}, buffer, _use_new_zipfile_serialization=kind == 7)
    return buffer.getvalue()


def in_base(dice: random.Random, content: bytes, place: Path, folder: Path) -> str:
    """In place of the weights or beside them, in one file or in shards."""
    shutil.copytree(folder / "clean", place)
    name = dice.choice(["pytorch_model.bin", "model.pt", SINGLE_NAME, "consolidated.00.pth", "config.json"])
    if dice.random() < 0.7:
        (place / SINGLE_NAME).unlink()
    (place / name).write_bytes(content)
    if dice.random() < 0.5:
        shard = "pytorch_model-00001-of-00001.bin"
        (place / shard).write_bytes(content)
        (place / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": shard}}))
    return f"{name}: {read_base(place)}"


def in_tokenizer(dice: random.Random, content: bytes, place: Path, folder: Path) -> str:
    shutil.copytree(folder / "clean", place)
    name = dice.choice(TOKENIZER_FILES)
    (place / name).write_bytes(content)
    return f"{name}: {read_base(place)}"


def by_index(dice: random.Random, content: bytes, place: Path, folder: Path) -> str:
    """The index names a pickle, here or elsewhere, under its own name or as safetensors."""
    shutil.copytree(folder / "clean", place)
    (place / SINGLE_NAME).unlink()
    name = dice.choice(["x.bin", "x.safetensors", "sub/x.bin", "../x.bin", str(folder / "x.bin"), "../x.safetensors"])
    target = place / name
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(content)
    (place / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}))
    return f"{name}: {read_base(place)}"


def as_adapter_of_base(dice: random.Random, content: bytes, place: Path, folder: Path) -> str:
    """A base that says it is an adapter, which transformers follows to another base and loads."""
    shutil.copytree(folder / "clean", place)
    other = place / "other"
    shutil.copytree(folder / "clean", other)
    (place / "adapter_model.bin").write_bytes(content)
    config = json.loads((folder / "adapter" / ADAPTER_CONFIG).read_text())
    chosen = dice.choice([str(other), "../clean", "owner/name"])
    (place / ADAPTER_CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": chosen}))
    return f"{chosen}: {read_base(place)}"


def in_adapter(dice: random.Random, content: bytes, place: Path, folder: Path) -> str:
    shutil.copytree(folder / "adapter", place)
    name = dice.choice(["adapter_model.bin", "adapter_model.safetensors", ADAPTER_CONFIG])
    if dice.random() < 0.7:
        (place / "adapter_model.safetensors").unlink()
    (place / name).write_bytes(content)
    model = base.load_base(Model(base=str(folder / "clean")), "cpu", "float32")
    return f"{name}: {outcome(lambda: adapter.load(model, place))}"


def in_checkpoint(dice: random.Random, content: bytes, place: Path, folder: Path) -> str:
    """In a checkpoint of ours, with sums that agree: whoever changed it can count as well."""
    name = dice.choice([*STRAY, *CHECKPOINT_FILES])

    def fill(stage_folder: Path) -> None:
        (stage_folder / checkpoint_files.STATE).write_text(json.dumps({"format": checkpoint_files.FORMAT}))
        (stage_folder / name).write_bytes(content)

    step = checkpoint_files.write(place, 1, fill)
    tensors = [
        lambda: checkpoint_files.load_file(step / checkpoint_files.OPTIMIZER),
        lambda: checkpoint_files.load_file(step / checkpoint_files.RANDOM),
    ]
    readers = [lambda: checkpoint_files.choose(place), lambda: checkpoint_files.Checkpoint.read(step), *tensors]
    return f"{name}: {'; '.join(map(outcome, readers))}"


def read_base(place: Path) -> str:
    model = Model(base=str(place))
    readers = (base.base_folder, base.read_config, load_tokenizer, lambda it: base.load_base(it, "cpu", "float32"))
    return "; ".join(outcome(lambda reader=reader: reader(model)) for reader in readers)


def outcome(read: Callable[[], object]) -> str:
    """How it ended. Only what the pickle did is judged here; words are the business of other lanes."""
    try:
        read()
    except QtuneError as fault:
        return type(fault).__name__
    except Exception as fault:  # a reader may trip over bytes as it likes, as long as it does not run them
        return f"{type(fault).__name__}: {fault}"
    return "read"
