"""S3: names and links that lead out of their folder, in recipes, shard indexes, and model and run folders."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from fault_lab import stage
from qtune.errors import QtuneError
from qtune.merge.config_files import write_small_files
from qtune.model import adapter, base
from qtune.model.checkpoint import BaseCheckpoint
from qtune.model.tokenizer import load_tokenizer
from qtune.recipe.base_kind import ADAPTER_CONFIG, INDEX_NAME, SINGLE_NAME
from qtune.recipe.load import load
from qtune.recipe.schema import Lora, Model
from qtune.rundir import RunDir

WHAT = "../, absolute names, NUL, $(...) and links in recipes and model folders reach nothing outside"
SECRET = "what a merged model must not carry along"
FILE_KEYS = ("tokenizer_file", "vocab_file", "merges_file", "chat_template_file", "name_or_path", "spm_file")
RUN_FILES = (
    "metrics.jsonl",
    "memory.jsonl",
    "history.jsonl",
    ".held",
    "log.txt",
    "lock.json",
    "checkpoints",
    "adapter",
)
SMALL_FILES = ("LICENSE", "notes.txt", "generation_config.json", "vocab.json", "extra.jinja", "NOTICE.md", "spm.model")


def run(cases: int, seed: int, folder: Path) -> Iterator[str | None]:
    """One payload a case, each in a new folder beside `outside`, where nothing may change or be read from."""
    dice = random.Random(seed)
    clean, outside = stage.make_base(folder / "clean"), folder / "outside"
    loaded = base.load_base(Model(base=str(clean)), "cpu", "float32")
    adapter.save(adapter.attach(loaded, Lora(rank=2), seed=0), folder / "adapter", str(clean))
    outside.mkdir()
    (outside / "secret.txt").write_text(SECRET)
    shutil.copy(clean / SINGLE_NAME, outside)
    before = contents(outside)
    attacks = (in_recipe, in_index, in_tokenizer_config, linked_small_file, linked_run_file, in_adapter_config)
    for case in range(cases):
        place = folder / "cases" / f"case-{case}"
        attack = attacks[case % len(attacks)]
        payload = made_up(dice, outside)
        fault = attack(dice, payload, place, folder)
        if contents(outside) != before:
            fault = "something outside was changed"
        yield f"{attack.__name__} with {payload!a}: {fault}" if fault else None
        shutil.rmtree(place)


def made_up(dice: random.Random, outside: Path) -> str:
    """A name that some reader might follow, or hand to a shell."""
    file = dice.choice(["secret.txt", SINGLE_NAME, "new.txt"])
    up = "../" * dice.randrange(1, 6)
    return dice.choice(
        [
            f"{up}outside/{file}",
            f"./x/../{up}outside/{file}",
            f"..\\..\\outside\\{file}",
            f"%2e%2e/%2e%2e/outside/{file}",
            f"{outside}/{file}",
            f"//{outside}/{file}",
            f"file://{outside}/{file}",
            f"~/{up}{outside}/{file}",
            f"x\0{outside}/{file}",
            f"{outside}/{file}\0.safetensors",
            f"$(touch {outside}/made)",
            f"`touch {outside}/made`",
            f"x; touch {outside}/made",
            f"x\ntouch {outside}/made",
            f"| touch {outside}/made",
            "\uff0e\uff0e/outside",
            "..",
            ".",
            "",
            "x" * 5000,
        ]
    )


def in_recipe(dice: random.Random, payload: str, place: Path, folder: Path) -> str | None:
    """A recipe's name is part of a run folder's; its files must be there."""
    place.mkdir(parents=True)
    (place / "rows.jsonl").write_text(stage.ROW)
    text = stage.RECIPE.replace('"./base"', json.dumps(str(folder / "clean")))
    key = dice.choice(["name", "chat_template"])
    line = f"{key} = {json.dumps(payload, ensure_ascii=False)}"
    written, instead = ('name = "t"', line) if key == "name" else ("[data]", f"{line}\n[data]")
    text = text.replace(written, instead)
    (place / "t.toml").write_text(text, encoding="utf-8")
    told, recipe = attempt(lambda: load(place / "t.toml"))
    if told or recipe is None or key == "chat_template":
        return told
    return f"the name {payload!a} was taken"


def in_index(dice: random.Random, payload: str, place: Path, folder: Path) -> str | None:
    shutil.copytree(folder / "clean", place)
    (place / SINGLE_NAME).rename(place / "part.safetensors")
    names = {"lm_head.weight": payload, "model.norm.weight": "part.safetensors"}
    (place / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    for read in (lambda: base.base_folder(Model(base=str(place))), lambda: BaseCheckpoint.open(place)):
        told, found = attempt(read)
        if told or found is not None:
            return told or "the index was taken"
    return None


def in_tokenizer_config(dice: random.Random, payload: str, place: Path, folder: Path) -> str | None:
    """Names of files in tokenizer_config.json, which some tokenizers open; what is copied is what was in the folder."""
    shutil.copytree(folder / "clean", place / "base")
    path = place / "base" / "tokenizer_config.json"
    keys = dice.sample(FILE_KEYS, 2)
    path.write_text(json.dumps({**json.loads(path.read_text()), **dict.fromkeys(keys, payload)}))
    told, _ = attempt(lambda: load_tokenizer(Model(base=str(place / "base"))))
    return told or copied(place)


def linked_small_file(dice: random.Random, payload: str, place: Path, folder: Path) -> str | None:
    """A link among the files that a merge copies; the hub's own cache is made of links, and those are followed."""
    shutil.copytree(folder / "clean", place / "base")
    link = place / "base" / dice.choice(SMALL_FILES)
    link.unlink(missing_ok=True)
    up = "../" * len((place / "base").relative_to(folder).parts)
    link.symlink_to(dice.choice([str(folder / "outside" / "secret.txt"), f"{up}outside/secret.txt"]))
    return copied(place)


def copied(place: Path) -> str | None:
    """What a merge writes beside the weights."""
    output = place / "merged"
    output.mkdir()
    told, _ = attempt(
        lambda: write_small_files(place / "base", output, Model(base=str(place / "base")), [1], "float32")
    )
    if told:
        return told
    leaked = [path.name for path in output.rglob("*") if path.is_file() and SECRET in path.read_text(errors="replace")]
    return f"{leaked[0]} of the merged model holds what was outside" if leaked else None


def linked_run_file(dice: random.Random, payload: str, place: Path, folder: Path) -> str | None:
    """A run folder whose files lead elsewhere, which resuming, merging and chatting would write to."""
    place.mkdir(parents=True)
    for name in ("lock.json", "invocation.json"):
        (place / name).write_text("{}")
    link = place / dice.choice(RUN_FILES)
    link.unlink(missing_ok=True)
    link.symlink_to(folder / "outside" / dice.choice(["secret.txt", "new.txt", "."]))
    for read in (lambda: RunDir.open(place), lambda: RunDir.open_to_resume(place)):
        told, found = attempt(read)
        if told or found is not None:
            return told or f"{link.name} was taken as a part of the run"
    return None


def in_adapter_config(dice: random.Random, payload: str, place: Path, folder: Path) -> str | None:
    """The base that an adapter names is not the one that is read."""
    shutil.copytree(folder / "adapter", place)
    path = place / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": payload}))
    model = base.load_base(Model(base=str(folder / "clean")), "cpu", "float32")
    told, loaded = attempt(lambda: adapter.load(model, place))
    return told or (None if loaded is not None else "the adapter was refused, though its base is given")


def attempt(read: Callable[[], object]) -> tuple[str | None, object]:
    """What went wrong in a way that is no refusal, and what was read; None where it was refused."""
    try:
        return None, read()
    except QtuneError:
        return None, None
    except Exception as fault:
        return f"{type(fault).__name__}: {fault}", None


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
