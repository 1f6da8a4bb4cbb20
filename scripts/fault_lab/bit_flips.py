"""R4: a checkpoint with a changed, cut, missing or added file is found out before it is read, and passed over."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from fault_lab.workshop import Workshop, difference
from qtune import atomic_files
from qtune.rundir import RunDir
from qtune.train import checkpoint_files

WHAT = "a flipped bit, a cut, missing or added file in the newest checkpoint"
RESUMED_EVERY = 25  # all are looked at, every so many are gone on from


def run(cases: int, seed: int, folder: Path) -> Iterator[str | None]:
    shop = Workshop.open(folder, seed)
    recipe = shop.recipe()
    shop.undisturbed(recipe)
    whole = RunDir(folder / "undisturbed")
    newest, older = (path for _, path in checkpoint_files.steps_in(whole.checkpoints)[:2])
    for case in range(cases):
        rng = random.Random(f"{seed} {case}")
        shop.clear("broken")
        broken = folder / "broken" / whole.checkpoints.name
        shutil.copytree(whole.checkpoints, broken)
        told = _break(rng, broken / newest.name)
        fault = _fault_of_choice(broken, older.name)
        if fault is None and case % RESUMED_EVERY == 0:
            shutil.copytree(whole.path, folder / "broken", dirs_exist_ok=True, ignore=_checkpoints_alone)
            fault = _fault_of_resume(shop, recipe, newest.name)
        yield None if fault is None else f"{told}: {fault}"


def _checkpoints_alone(folder: str, names: list[str]) -> list[str]:
    return ["checkpoints"] if "checkpoints" in names else []


def _break(rng: random.Random, path: Path) -> str:
    """Do one thing to one file of a checkpoint, and say what."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = rng.choice(files)
    size = file.stat().st_size
    kind = rng.choice(["flip", "flip", "flip", "cut", "missing", "added", "empty", "swapped"])
    if kind == "flip":
        at, bit = rng.randrange(size), rng.randrange(8)
        with file.open("r+b") as handle:
            handle.seek(at)
            byte = handle.read(1)[0]
            handle.seek(at)
            handle.write(bytes([byte ^ 1 << bit]))
        return f"{file.name}: bit {bit} of byte {at} flipped"
    if kind == "cut":
        with file.open("r+b") as handle:
            handle.truncate(rng.randrange(size))
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "missing":
        file.unlink()
    elif kind == "added":
        file.with_name(rng.choice(["x", "optimizer.pt", b"\xff".decode(errors="surrogateescape")])).write_bytes(b"x")
    else:
        other = rng.choice([each for each in files if each != file])
        one, two = file.read_bytes(), other.read_bytes()
        file.write_bytes(two)
        other.write_bytes(one)
    return f"{file.name}: {kind}"


def _fault_of_choice(checkpoints: Path, older: str) -> str | None:
    chosen, why = checkpoint_files.choose(checkpoints)
    if chosen is None or chosen.name != older:
        return f"{chosen} was chosen: {why}"
    newest = checkpoint_files.steps_in(checkpoints)[0][1]
    reason = atomic_files.what_is_broken(newest)
    return None if reason and f"{newest.name} is passed over: {reason}." in why else f"it was not named: {why}"


def _fault_of_resume(shop: Workshop, recipe: Path, newest: str) -> str | None:
    ended = shop.start(recipe, "broken").wait()
    if ended.code != 0:
        return f"resumed with exit {ended.code}, {ended.last_line}"
    if f"{newest} is passed over" not in " ".join(ended.text.split()):
        return "the run that went on did not say which checkpoint it passed over"
    return difference(shop.folder / "broken", shop.folder / "undisturbed")
