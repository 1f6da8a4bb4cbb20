"""What a run would refuse that is the fault of no single row: it is said by the check of the data too."""

from collections.abc import Iterator, Sequence
from itertools import islice

from transformers import PreTrainedTokenizerBase

from qtune.audit.audit import Audit
from qtune.audit.issue_types import WHOLE_FILE
from qtune.audit.issues import Issue
from qtune.audit.row_checks import NOT_ASKED, NOT_SCORABLE
from qtune.audit.thresholds import NOTHING_LEFT
from qtune.data.canaries import Phrasing, planted_rows
from qtune.data.formats import FORMATS
from qtune.data.mixture import parted
from qtune.errors import DataError
from qtune.recipe.schema import Recipe
from qtune.units import counted


def refusals(audited: Audit, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Issue]:
    """Faults of the whole: a source without a row to use, a split that leaves none to train on, held-out rows that the
    metric cannot score, planted rows that do not fit."""
    told = list(_no_rows(audited))
    is_read = all(source.rows for source in audited.sources) and not audited.groups.rows(*WHOLE_FILE)
    if told or not is_read:
        return told
    try:
        held_out = _held_out(audited, recipe)
    except DataError as fault:
        return [Issue(NOTHING_LEFT, "fault", 0, str(fault), "", ())]
    return [*_unscorable(audited, recipe, held_out), *_canaries(audited, recipe, tokenizer)]


def _no_rows(audited: Audit) -> Iterator[Issue]:
    """Sources of whose rows a run takes none; one that holds none at all has a finding of its own."""
    for source in audited.sources:
        if source.rows and not source.taken_rows:
            sentence = f"No row of {source.name} can be used, and `qtune run` stops there."
            advice = "Mend the rows that are named above"
            if audited.groups.rows("too-long"):
                advice += ", or raise data.max_tokens"
            yield Issue(NOTHING_LEFT, "fault", source.rows, sentence, f"{advice}.", ())


def _held_out(audited: Audit, recipe: Recipe) -> Sequence[int]:
    """The positions of held-out rows among those that a run takes, in order. Raises DataError where all would be."""
    counts = [source.taken_rows for source in audited.sources]
    are_texts = [FORMATS[source.format].is_text for source in audited.sources]
    _, apart = parted(counts, are_texts, recipe.data, recipe.train.seed)
    held_out: list[int] = apart.tolist()
    return held_out


def _unscorable(audited: Audit, recipe: Recipe, held_out: Sequence[int]) -> Iterator[Issue]:
    """Of the rows that would be asked: the first `evaluate.rows` that have a prompt."""
    taken, wanted = audited.taken, recipe.evaluate
    asked = list(islice((row for row in held_out if taken.rows[row] != NOT_ASKED), wanted.rows))
    bad = [row for row in asked if taken.rows[row] == NOT_SCORABLE]
    if bad:
        sentence = (
            f"{len(bad):,} of {counted(len(asked), 'held-out row')} cannot be scored by evaluate.metric ="
            f' "{wanted.metric}", and `qtune run` refuses them.'
        )
        places = tuple(taken.faults[row] for row in bad if row in taken.faults)
        yield Issue("not-scorable", "fault", len(bad), sentence, "", places)


def _canaries(audited: Audit, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Iterator[Issue]:
    if not recipe.evaluate.canaries:
        return
    try:
        planted_rows(recipe, Phrasing.of(recipe, audited.sources[0].format, tokenizer))
    except DataError as fault:
        yield Issue("canaries", "fault", 0, str(fault), "", ())
