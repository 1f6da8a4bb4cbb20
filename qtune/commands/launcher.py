"""The ranks of one run on one machine, one a card: forked here before anything heavy is imported, then watched.

A rank finds in its environment what torchrun would have set, and cannot tell who launched it. Signals are passed on to
every rank, but for Ctrl-C, which a terminal gives to all by itself. When a rank ends that should not have, the others
have the time that ranks wait for each other to find out, to save and to say so, and are killed after it. Before all
have met they have nothing to save, and are killed soon.
"""

import contextlib
import ctypes
import math
import os
import signal
import socket
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from qtune import gpu_choice
from qtune.commands.arguments import positive
from qtune.distributed.launched import MET
from qtune.distributed.ranks import limit_seconds
from qtune.errors import UserError
from qtune.units import counted

if TYPE_CHECKING:
    from qtune.recipe.schema import Recipe

HERE = "127.0.0.1"
SECONDS_AFTER_RANK_0 = 30.0  # chosen: without it nobody saves, and all that is left is to say why
SECONDS_BEFORE_THEY_MET = 5.0  # chosen: to fail for the same reason, as there is nothing to save yet
SI_KERNEL = 128  # where sigaction(2) says that the terminal sent it, to the whole foreground job
DIES_WITH_PARENT = 1  # prctl(2)'s PR_SET_PDEATHSIG
POLL_SECONDS = 1.0  # chosen: for the time limits; the end of a rank is told at once
FORWARDED = (signal.SIGINT, signal.SIGTERM)


def cards_argument(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--cards",
        type=positive,
        metavar="N",
        help="use so many cards; default all that are like the one with most free memory. Without a card, N processes",
    )


def is_launched() -> bool:
    """Whether another launcher has settled how many processes there are: torchrun and accelerate, or srun with more
    than one."""
    return "RANK" in os.environ or os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"


def refuse_cards_when_launched(options: Namespace) -> None:
    """Raises UserError for --cards where a launcher has settled them."""
    if options.cards is not None and is_launched():
        raise UserError("--cards: torchrun, accelerate or srun has settled how many processes there are. Leave it out.")


def launch_ranks(options: Namespace, recipe_of: Callable[[], "Recipe"]) -> int | None:
    """The exit code of a run on several cards, once all ranks have ended; None in each of the ranks, and where this
    process is alone.

    Raises UserError for more cards than there are, and for more than a step has packs.
    """
    if is_launched():
        return None
    names = gpu_choice.cards_to_use(options.cards)
    count = len(names) or options.cards or 1
    if count > 1:
        count = _as_many_as_packs(count, recipe_of(), is_asked=options.cards is not None)
    if names and (count > 1 or options.cards):
        os.environ[gpu_choice.VISIBLE] = ",".join(names[:count])
    if count == 1:
        return None
    said = f"{count} cards: a process for each; --cards 1 uses one" if names else f"{count} processes on this processor"
    print(said, file=sys.stderr if getattr(options, "json", False) else sys.stdout, flush=True)
    return fork_ranks(count)


def _as_many_as_packs(count: int, recipe: "Recipe", is_asked: bool) -> int:
    if is_asked:
        refuse_more_than_packs(count, recipe)
    return min(count, _packs_of_a_step(recipe))


def _packs_of_a_step(recipe: "Recipe") -> int:
    return recipe.train.micro_batch * recipe.train.gradient_accumulation


def refuse_more_than_packs(count: int, recipe: "Recipe") -> None:
    """Raises UserError for more cards than a step has packs."""
    packs = _packs_of_a_step(recipe)
    if count > packs:
        raise UserError(
            f"--cards: {count} are too many, as a step of this recipe is {counted(packs, 'pack')} (train.micro_batch"
            f" times train.gradient_accumulation) and each card needs one. Take {packs}, or raise"
            " train.gradient_accumulation."
        )


def fork_ranks(count: int) -> int | None:
    """None in each of `count` new processes, which are ranks; here the exit code, once they have ended."""
    have_met, met = os.pipe()
    environment = {"MASTER_ADDR": HERE, "MASTER_PORT": str(_free_port()), MET: str(met), **_threads(count)}
    ranks, parent = _Watched(limit_seconds(), have_met), os.getpid()
    watched = {*FORWARDED, signal.SIGCHLD}
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            os.close(have_met)
            _become(rank, count, environment, parent)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return None
        ranks.pids.append(pid)
    os.close(met)
    try:
        return ranks.watched_to_their_end()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((HERE, 0))
        return int(free.getsockname()[1])


def _threads(count: int) -> Mapping[str, str]:
    """Each its share of the cores, unless the user has said how many threads."""
    given = os.environ.get("OMP_NUM_THREADS")
    return {"OMP_NUM_THREADS": given or str(max(1, (os.cpu_count() or 1) // count))}


def _become(rank: int, count: int, environment: Mapping[str, str], parent: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux alone has it; elsewhere ranks find out by themselves
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGTERM)
        if os.getppid() != parent:
            raise SystemExit(128 + signal.SIGTERM)
    os.environ |= environment
    os.environ |= {name: str(count) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    if rank > 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


class _Watched:
    """Processes by rank; each that has met the others says so in the pipe `have_met`."""

    def __init__(self, seconds_after_another: float, have_met: int) -> None:
        self._seconds_after_another, self._have_met, self._met = seconds_after_another, have_met, 0
        os.set_blocking(have_met, False)
        self.pids: list[int] = []
        self._codes: dict[int, int] = {}  # by rank; -9 of one that SIGKILL ended
        self._late: list[int] = []  # whom we killed
        self._until = math.inf  # when

    def watched_to_their_end(self) -> int:
        """The exit code of all: the first rank's that is not 0, of those that ended by themselves if there is one."""
        while self._running:
            told = signal.sigtimedwait({*FORWARDED, signal.SIGCHLD}, POLL_SECONDS)
            if told is not None and told.si_signo in FORWARDED and told.si_code != SI_KERNEL:
                self._send(told.si_signo)
            self._reap()
            if time.monotonic() > self._until and not self._late:
                self._late = self._running
                self._send(signal.SIGKILL)
        self._tell()
        codes = [self._codes[rank] for rank in sorted(self._codes, key=lambda rank: (rank in self._late, rank))]
        code = next((code for code in codes if code), 0)
        return code if code >= 0 else 128 - code

    @property
    def _running(self) -> list[int]:
        return [rank for rank in range(len(self.pids)) if rank not in self._codes]

    def _send(self, number: int) -> None:
        for rank in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def _reap(self) -> None:
        for rank in self._running:
            pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
            if pid:
                self._codes[rank] = code = os.waitstatus_to_exitcode(status)
                self._until = min(self._until, time.monotonic() + self._seconds_after(rank, code))

    def _seconds_after(self, rank: int, code: int) -> float:
        """That the others have when this one has ended."""
        with contextlib.suppress(BlockingIOError):
            self._met += len(os.read(self._have_met, len(self.pids)))
        if code and self._met < len(self.pids):
            return SECONDS_BEFORE_THEY_MET
        if rank == 0:
            return SECONDS_AFTER_RANK_0
        return self._seconds_after_another if code else math.inf

    def _tell(self) -> None:
        for rank, code in sorted(self._codes.items()):
            if rank in self._late:
                print(f"Rank {rank} did not end with the others, and was killed.", file=sys.stderr)
            elif code < 0:
                hint = ", as the system does where memory runs out" if code == -signal.SIGKILL else ""
                print(f"Rank {rank} was ended by {signal.Signals(-code).name}{hint}.", file=sys.stderr)
