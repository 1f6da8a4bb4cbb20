#!/usr/bin/env python3
"""Seconds and memory of each thing that is done with rows before and during training, for files of any size.

    scripts/bench_rows.py --tokenizer FOLDER --gigabytes 0.2 1      chats are made and read; --keep FOLDER to keep files
    scripts/bench_rows.py --tokenizer FOLDER --audit --gigabytes 1  `qtune data check`'s reading, too

Memory is of this process and those that it started: held is what nobody else could have (RssAnon), mapped are pages
of files, which the kernel gives back when memory is short. The cache is a folder that ends with the script.
"""

import argparse
import contextlib
import itertools
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer

from qtune.audit.audit import audit
from qtune.cache_dir import SIZE_VARIABLE, VARIABLE
from qtune.data.packing import collate, packed_rows, seq_lengths
from qtune.data.prepare import prepare
from qtune.plan.workload import heaviest_first
from qtune.ready import work_of
from qtune.recipe.schema import Data, Model, Recipe
from qtune.train.sampler import DataOrder

GENERAL = Path(__file__).parent.parent / "qtune/evaluate/general.txt"
SAMPLE_SECONDS = 0.05
MEAN_WORDS = 75  # of a turn, which makes a row of two some 1,000 bytes
STEPS = 200


class Held:
    """The most memory by stage, sampled beside what is measured."""

    def __init__(self) -> None:
        self.stage, self.peaks = "start", {}
        self.began: dict[str, float] = {}
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def enter(self, stage: str) -> None:
        if stage != self.stage:
            self.stage = stage
            self.began[stage] = time.perf_counter()

    def _sample(self) -> None:
        while not self._ends.wait(SAMPLE_SECONDS):
            stage = self.stage
            own, all_held, mapped = 0, 0, 0
            for number in _processes():
                anon, file = _resident(number)
                own += anon * (number == os.getpid())
                all_held, mapped = all_held + anon, mapped + file
            before = self.peaks.get(stage, (0, 0, 0))
            self.peaks[stage] = tuple(map(max, before, (own, all_held, mapped)))

    def tell(self) -> None:
        self.enter("end")
        self._ends.set()
        names = list(self.began)
        print(f"{'':24}{'seconds':>9}{'held here':>11}{'by all':>9}{'mapped':>9}  (MB at the most)")
        for name, after in itertools.pairwise(names):
            own, held, mapped = (value / 1e6 for value in self.peaks.get(name, (0, 0, 0)))
            print(f"{name:24}{self.began[after] - self.began[name]:9.1f}{own:11,.0f}{held:9,.0f}{mapped:9,.0f}")


def _processes() -> list[int]:
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return [os.getpid(), *map(int, children.read_text().split())]


def _resident(number: int) -> tuple[int, int]:
    """Bytes of a process that are its own, and of files that it maps."""
    values = {"RssAnon": 0, "RssFile": 0, "RssShmem": 0}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{number}/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in values:
                values[name] = int(rest.split()[0]) * 1024
    return values["RssAnon"] + values["RssShmem"], values["RssFile"]


def make_chats(path: Path, size: int) -> int:
    """Chats of words drawn from a text until the file has `size` bytes; how many."""
    dice = random.Random(0)
    words = GENERAL.read_text(encoding="utf-8").split()
    rows = 0
    with path.open("w", encoding="utf-8") as file:
        written = 0
        while written < size:
            asked, told = (" ".join(dice.choices(words, k=1 + int(dice.expovariate(1 / MEAN_WORDS)))) for _ in "qa")
            asked, told = asked.replace('"', "'").replace("\\", ""), told.replace('"', "'").replace("\\", "")
            written += file.write(
                f'{{"messages": [{{"role": "user", "content": "{rows} {asked}"}},'
                f' {{"role": "assistant", "content": "{told}"}}]}}\n'
            )
            rows += 1
    return rows


def measure(path: Path, folder: Path, with_audit: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    recipe = Recipe(name="rows", model=Model(base=str(folder)), data=Data(train=str(path)))
    held = Held()
    if with_audit:
        held.enter("check")
        audit(recipe.data, tokenizer, lambda what, done, total: held.enter(f"check: {what}"))
    held.enter("prepare")
    prepared = prepare(recipe, tokenizer, lambda what, done, total: held.enter(f"prepare: {what}"))
    for start in ("first", "from the cache"):
        if start != "first":
            held.enter("prepare: from the cache")
            prepared = prepare(recipe, tokenizer)
        held.enter(f"plan: {start}")
        work = work_of(prepared, recipe.train)
        work.heaviest(4), work.document_tokens, work.mean_tokens
        packs = packed_rows(prepared.train, prepared.train_packs)
        held.enter(f"rehearsal: {start}")
        heaviest_first(seq_lengths(packs))[:4]
        held.enter(f"training: {start}")
        order = DataOrder(len(packs), 0)
        for number, _ in zip(order, range(STEPS * 8), strict=False):
            collate([packs[number]])
        order.of_step(len(packs) // 16, 1, 8)
    print(prepared.fingerprint, f"{prepared.report.train_rows:,} rows in {len(packs):,} packs")
    held.tell()


@contextlib.contextmanager
def files_in(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.2])
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--audit", action="store_true")
    wanted = parser.parse_args()
    with files_in(wanted.keep) as folder, tempfile.TemporaryDirectory() as cache:
        os.environ |= {VARIABLE: cache, SIZE_VARIABLE: "100GiB"}
        for size in wanted.gigabytes:
            path = folder / f"chats-{size:g}.jsonl"
            rows = None if path.exists() else make_chats(path, int(size * 1e9))
            print(f"{path.name}: {path.stat().st_size / 1e9:.2f} GB" + ("" if rows is None else f", {rows:,} rows"))
            measure(path, wanted.tokenizer, wanted.audit)


if __name__ == "__main__":
    main()
