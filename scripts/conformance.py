#!/usr/bin/env python3
"""Every causal architecture of the installed transformers, tiny and of random weights, from data to merge.

    scripts/conformance.py                            all of them, a line each
    scripts/conformance.py qwen3_5 mistral            these, step by step
    scripts/conformance.py --output docs/models.md    all of them, and the page; with names, their lines of it

The libraries are imported once, and each architecture is walked through `conforming.proofs` in a fork of its own.
"""

import argparse
import contextlib
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conforming.page import Row
    from conforming.proofs import Finding

REPOSITORY = Path(__file__).resolve().parent.parent
PROCESSOR_SECONDS = 60  # for one architecture; most take seven
WALL_SECONDS = 500.0  # for the same where others are at work, too


def prepare_imports() -> None:
    """What the libraries read as they are imported, and the folders of qtune, of `conforming` and of the tests, whose
    tokenizers it takes. One thread, as forks take no thread pool with them."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "QTUNE_CACHE": "off",
    }
    sys.path[:0] = [str(REPOSITORY / folder) for folder in ("", "scripts", "tests", "tests/support")]


def warm_up() -> None:
    """Walk one architecture here: what is imported or compiled on the way is there in every fork."""
    from conforming import proofs

    from qtune.model import base

    base.quiet_libraries()
    with (
        tempfile.TemporaryDirectory(prefix="conformance-") as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        for _ in proofs.walk("llama", Path(folder), is_whole=True):
            pass


def walked(kind: str, is_whole: bool) -> "Iterator[tuple[Finding, float]]":
    """Each finding of one architecture with the processor's seconds, as it is made. What takes too long is one, too."""
    from conforming.proofs import Finding

    mine, theirs = multiprocessing.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        forked = multiprocessing.get_context("fork").Process(target=_walk, args=(kind, Path(folder), is_whole, theirs))
        forked.start()
        theirs.close()
        with contextlib.suppress(EOFError):
            while mine.poll(WALL_SECONDS):
                yield mine.recv()
            forked.kill()
        forked.join()
    if forked.exitcode:
        told = f"no end within {PROCESSOR_SECONDS} s, or the process died of it (status {forked.exitcode})"
        yield Finding("end", "", "our fault", told), 0.0


def _walk(kind: str, folder: Path, is_whole: bool, pipe: Any) -> None:
    """What the fork does: all that is printed goes to a file."""
    import torch
    from conforming import proofs

    from qtune.model import base

    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS))
    torch.set_num_threads(1)
    base.quiet_libraries()
    with (folder / "log.txt").open("w") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
        try:
            began = time.process_time()
            for finding in proofs.walk(kind, folder, is_whole):
                pipe.send((finding, time.process_time() - began))
                began = time.process_time()
        except BaseException as fault:
            pipe.send((proofs.Finding("walk", "", "our fault", proofs.first_line(fault)), time.process_time() - began))
    pipe.close()
    os._exit(0)  # threads of the libraries do not outlive a fork, and leaving would wait for them


def rows(kinds: Sequence[str], is_whole: bool = True, at_once: int = 1) -> "Iterator[Row]":
    """A row of each of `kinds`, in their order; those that are made as another is are walked once."""
    from conforming import small_models
    from conforming.page import Row

    made = list(dict.fromkeys(map(small_models.text_kind, kinds)))
    with ThreadPoolExecutor(at_once) as pool:
        found = {
            kind: pool.submit(lambda kind: [finding for finding, _ in walked(kind, is_whole)], kind) for kind in made
        }
        for kind in kinds:
            text = small_models.text_kind(kind)
            yield Row(kind, tuple(found[text].result()), text if text != kind else "")


def tell_in_full(kinds: Sequence[str], is_whole: bool) -> bool:
    """Print each step of `kinds`; whether all of them are proven or refused."""
    from conforming import small_models

    is_well = True
    for kind in kinds:
        print(kind, flush=True)
        for finding, seconds in walked(small_models.text_kind(kind), is_whole):
            is_well &= finding.outcome in ("proven", "refused")
            said = f"{finding.outcome.upper()}: {finding.fault}" if finding.fault else finding.told
            print(f"  {finding.step:20} {seconds:5.1f} s  {said}", flush=True)
    return is_well


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="model types; all where none is named")
    parser.add_argument("--quick", action="store_true", help="without the run and what comes after it")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, metavar="N", help="so many side by side")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the page")
    options = parser.parse_args()
    prepare_imports()
    from conforming import page, small_models

    import qtune.run  # noqa: F401  (once, for all forks)

    if options.kinds and not options.output:
        return 0 if tell_in_full(options.kinds, not options.quick) else 1
    before = options.output.read_text(encoding="utf-8") if options.output and options.output.is_file() else ""
    made = []
    for row in rows(options.kinds or small_models.kinds(), not options.quick, options.at_once):
        made.append(row)
        print(row.line(), flush=True)
        if options.output:
            options.output.write_text(page.page(made, before), encoding="utf-8")
    print(page.counts(row.outcome for row in made))
    return 1 if any(row.outcome in page.BAD for row in made) else 0


if __name__ == "__main__":
    sys.exit(main())
