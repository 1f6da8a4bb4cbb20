"""Passes of several ranks through layers of which each holds a part, a layer of all at the same time.

A layer comes together only where every rank hands out its part of it. So before a pass all say what they want, nothing,
a pass forward, or one forward and backward, and all go through the most that anybody wants. A rank that wants less, or
whose pass has failed in the middle, still sees every layer of it, without computing: it only hands out its parts.

Held less of: nothing; see `memory.weight_streaming`.
Costs: a small message of all to all a pass; a rank that is done waits for those that are not.
Refuses: nothing. Where a rank does not come, the time limit of `distributed.ranks` names it.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qtune.distributed.ranks import Ranks
from qtune.errors import RankLost

NOTHING, FORWARD, FORWARD_AND_BACKWARD = 0, 1, 2  # what a rank wants, by how much it is
Visit = tuple[int, bool]  # of which layer, and whether on the way forward


class Lockstep:
    """The passes of one rank. `bring_in(layer, is_forward, goes_round)` is what all ranks do at every layer, in one
    order: `goes_round` says that no backward pass follows, but perhaps another forward pass."""

    def __init__(self, ranks: Ranks, bring_in: Callable[[int, bool, bool], None]):
        self._ranks, self._bring_in = ranks, bring_in
        self._layers: Sequence[int] = ()
        self._left: deque[Visit] = deque()
        self._goes_round, self._is_together = False, False

    def rule(self, model: Any) -> None:
        """Have `passes_together(model)` be these."""
        model.passes_in_lockstep = self.together

    def go_through(self, layers: Sequence[int]) -> None:
        """From the next pass on, these are its layers, in the order of a forward pass."""
        self._layers = layers

    def come_to(self, layer: int, is_forward: bool, trains: bool) -> None:
        """This rank's pass has come to `layer`; one that `trains` has a backward pass, too. Raises RankLost."""
        assert self._is_together, "a pass through layers in parts is run inside `together`"
        if (layer, is_forward) not in self._left:
            assert is_forward, "who comes to a layer again has said that there is a backward pass"
            self._see_out()
            self._begin(FORWARD_AND_BACKWARD if trains else FORWARD)
        while self._next() != (layer, is_forward):
            pass

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """For all passes of this rank; it ends when no rank wants one any more.

        All ranks enter it at the same places of the story. Raises RankLost.
        """
        if self._is_together:
            yield
            return
        self._is_together = True
        try:
            yield
        except RankLost:
            raise
        except Exception:
            self._see_all_out()
            raise
        else:
            self._see_all_out()
        finally:
            self._is_together = False
            self._left.clear()

    def _begin(self, wanted: int) -> int:
        agreed = max(self._ranks.gather(wanted))
        there = [(layer, True) for layer in self._layers] if agreed >= FORWARD else []
        back = [(layer, False) for layer in reversed(self._layers)] if agreed == FORWARD_AND_BACKWARD else []
        self._left, self._goes_round = deque([*there, *back]), agreed == FORWARD
        return agreed

    def _next(self) -> Visit:
        """Be at the next layer of the pass, with all others; if that fails, it is still the next."""
        visit = self._left[0]
        self._bring_in(*visit, self._goes_round and visit[1])
        return self._left.popleft()

    def _see_out(self) -> None:
        """Hand out what others need of the pass that this rank has left."""
        while self._left:
            self._next()

    def _see_all_out(self) -> None:
        self._see_out()
        while self._begin(NOTHING) != NOTHING:
            self._see_out()


def passes_together(model: Any) -> contextlib.AbstractContextManager[None]:
    """`Lockstep.together` of the model's passes, where other ranks hold parts of it; else nothing."""
    together = getattr(model, "passes_in_lockstep", contextlib.nullcontext)
    entered: contextlib.AbstractContextManager[None] = together()
    return entered
