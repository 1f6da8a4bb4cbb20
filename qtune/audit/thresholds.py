"""What was found, judged: which of it a run would stop at, or the recipe's thresholds do not let pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from qtune.audit.audit import Audit, SourceCounts
from qtune.audit.issue_types import KINDS, UNUSABLE, WHOLE_FILE
from qtune.audit.issues import Group, Issue, Level
from qtune.audit.length_stats import TokenCounts
from qtune.data.stop_tokens import StopChain
from qtune.data.unused_columns import Unused
from qtune.recipe.schema import Data
from qtune.units import counted, format_percent

MEND_OR_SKIP = 'Mend them, or skip them with data.on_bad_row = "drop".'
NOTHING_LEFT = "nothing-left"  # follows from faults of rows where there are any
SKIPPED = "They are skipped; mend them to learn from them."
Outcome = Literal["fine", "warnings", "faults"]


@dataclass(frozen=True)
class Checked:
    """The whole of a check: sources, findings with faults first, lengths, what ends an answer, columns that nobody need
    read, texts that are cut, and how files were read."""

    sources: tuple[SourceCounts, ...]
    findings: tuple[Issue, ...]
    tokens: TokenCounts | None
    stops: StopChain | None
    unused: tuple[Unused, ...] = ()
    cut_texts: int = 0
    pieces: int = 0
    notices: tuple[str, ...] = ()

    @property
    def outcome(self) -> Outcome:
        if any(finding.level == "fault" for finding in self.findings):
            return "faults"
        return "warnings" if self.findings else "fine"


def judge(audited: Audit, data: Data, refused: Sequence[Issue] = ()) -> Checked:
    """Findings in the order of `KINDS`, those that are faults before those that are warnings; `refused` are more."""
    reasons = dict(_exceeded(audited, data))
    findings = [_finding(code, audited, reasons, data.on_bad_row) for code in KINDS if code in audited.groups.by_code]
    is_told = any(finding.level == "fault" for finding in findings)
    findings += [finding for finding in refused if not (is_told and finding.code == NOTHING_LEFT)]
    findings += [*_empty_sources(audited), *_unused_findings(audited.unused), *_stop_findings(audited.stops)]
    findings.sort(key=lambda finding: finding.level != "fault")
    harmless = tuple(each for each in audited.unused if each.advice is None)
    cut = audited.cut
    return Checked(
        audited.sources,
        tuple(findings),
        audited.tokens,
        audited.stops,
        harmless,
        cut.texts,
        cut.pieces,
        audited.notices,
    )


def _exceeded(audited: Audit, data: Data) -> Iterator[tuple[str, str]]:
    """The codes that are faults, each with the end of a sentence that says why."""
    limits, groups = data.check, audited.groups
    for code in WHOLE_FILE:
        yield code, ": `qtune run` stops there"
    for code in UNUSABLE:
        if data.on_bad_row == "error":
            yield code, ', and `qtune run` refuses them (data.on_bad_row = "error")'
        else:
            dropped = _share(groups.rows(*UNUSABLE), audited.rows)
            if dropped > limits.max_dropped_fraction:
                of_no_use = f"; {format_percent(dropped)} of all are of no use"
                yield code, of_no_use + _over("max_dropped_fraction", limits.max_dropped_fraction)
    if data.on_long == "error":
        yield "too-long", ', and `qtune run` refuses them (data.on_long = "error")'
    for code, share, field, limit in (
        ("too-long", _share_of_long(audited, data), "max_long_fraction", limits.max_long_fraction),
        (
            "duplicate",
            _share(groups.rows("duplicate"), audited.rows),
            "max_duplicate_fraction",
            limits.max_duplicate_fraction,
        ),
        (
            "overlap",
            _share(groups.rows("overlap"), audited.held_out_rows),
            "max_overlap_fraction",
            limits.max_overlap_fraction,
        ),
    ):
        if share > limit:
            yield code, _over(field, limit)


def _share_of_long(audited: Audit, data: Data) -> float:
    """Of the rows; where long ones are cut and stay, of what is trained, so much as goes with what is cut."""
    if data.on_long == "truncate" and audited.tokens is not None:
        return _share(audited.tokens.lost_trained_tokens, audited.tokens.trained_tokens)
    return _share(audited.groups.rows("too-long"), audited.rows)


def _share(rows: int, total: int) -> float:
    return rows / total if total else 0.0


def _over(field: str, limit: float) -> str:
    return f", more than data.check.{field} = {limit:g}"


def _finding(code: str, audited: Audit, reasons: dict[str, str], on_bad_row: str) -> Issue:
    group = audited.groups.by_code[code]
    what_to_do = {"error": MEND_OR_SKIP, "drop": SKIPPED}[on_bad_row] if code in UNUSABLE else ""
    advice = f"{KINDS[code].advice} {what_to_do}".strip()
    level: Level = "fault" if code in reasons else "warning"
    sentence = f"{_headline(code, group, audited)}{reasons.get(code, '')}."
    return Issue(code, level, group.rows, sentence, advice, tuple(group.places))


def _headline(code: str, group: Group, audited: Audit) -> str:
    """`3 of 3,000 rows lack an answer`."""
    clause, one = KINDS[code].clause, group.rows == 1
    verb = clause.format(s="s" if one else "", have="has" if one else "have", are="is" if one else "are")
    if code in ("unreadable-file", "byte-order-mark", "unknown-columns"):
        return f"{counted(group.rows, 'file')} {verb}"
    if code == "not-utf8":
        return f"{counted(group.rows, 'line')} {verb}"
    total = audited.held_out_rows if code.endswith("overlap") else audited.rows
    share = format_percent(_share(group.rows, total))
    lost = ""
    if code == "too-long" and audited.tokens is not None:
        tokens = audited.tokens
        lost = (
            f" = {tokens.max_tokens:,} ({share}); with them go {tokens.lost_trained_tokens:,} of"
            f" {tokens.trained_tokens:,} trained tokens"
        )
    return f"{group.rows:,} of {counted(total, 'row')} {verb}{lost or f' ({share})'}"


def _stop_findings(stops: StopChain | None) -> list[Issue]:
    if stops is None:
        return []
    return [Issue("stop-tokens", "warning", 0, doubt, "", ()) for doubt in stops.doubts]


def _unused_findings(unused: Sequence[Unused]) -> list[Issue]:
    return [
        Issue("unused-field", "warning", each.rows, each.sentence, each.advice, ())
        for each in unused
        if each.advice is not None
    ]


def _empty_sources(audited: Audit) -> list[Issue]:
    """A file that could be read and holds no row at all."""
    told_already = audited.groups.rows(*WHOLE_FILE)
    return [
        Issue("no-rows", "fault", 0, f"{source.name} holds no rows.", "Name another file.", ())
        for source in audited.sources
        if source.rows == 0 and not told_already
    ]
