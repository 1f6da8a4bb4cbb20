"""One row for a person: trained text in colour and between marks, special tokens to be seen, the cut drawn."""

import re
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text

from qtune.data.tokenize import Stretch
from qtune.report.tables import TRAINED_STYLE, WARNING_STYLE
from qtune.report.wording import one_line, visible
from qtune.units import counted

if TYPE_CHECKING:
    from qtune.audit.row_preview import ShownRow

READ_STYLE, SPECIAL_STYLE, CUT_STYLE, THOUGHT_STYLE = "", "cyan", "dim strike", "underline"


def row_table(row: "ShownRow") -> RenderableType:
    """Where the row stands and its counts, then the row itself, whole."""
    heading = Text.assemble(
        (one_line(row.place), "bold"), f" · row {row.number:,}", f" · {row.format}" if row.format else ""
    )
    parts: list[RenderableType] = [heading]
    if row.stretches:
        lost = f", {row.cut_trained_tokens:,} trained ones lost" if row.cut_trained_tokens else ""
        counts = f"{counted(row.tokens, 'token')}, {row.trained_tokens:,} trained{lost}"
        pieces = f", in {counted(row.pieces, 'piece')}" if row.pieces > 1 else ""
        parts.append(Text(f"{counts}; data.max_tokens = {row.max_tokens:,}{pieces}"))
    if row.not_used is not None:
        parts.append(Text(f"not used: {one_line(row.not_used)}", WARNING_STYLE))
    if row.unused:
        named = ", ".join(f"`{one_line(field)}`" for field in row.unused)
        parts.append(Text(f"of this row nobody reads {named}", WARNING_STYLE))
    if row.stretches:
        thought = (", thoughts are underlined", "dim") if any(each.is_thought for each in row.stretches) else ""
        parts += [
            Text.assemble(("»this«", TRAINED_STYLE), (" is trained, the rest is only read", "dim"), thought),
            Text(),
        ]
        parts += _text(row)
    return Group(*parts)


def _text(row: "ShownRow") -> list[RenderableType]:
    kept = [stretch for stretch in row.stretches if not stretch.is_cut]
    cut = [stretch for stretch in row.stretches if stretch.is_cut]
    if not cut:
        return [_joined(kept, row.special_tokens)]
    rule = Rule(f"cut here, behind {row.max_tokens:,} tokens", style=WARNING_STYLE, characters="┄")
    return [_joined(kept, row.special_tokens), rule, _joined(cut, row.special_tokens)]


def _joined(stretches: list[Stretch], special_tokens: tuple[str, ...]) -> Text:
    text = Text(overflow="fold")
    for stretch in stretches:
        shown = visible(stretch.text)
        style = TRAINED_STYLE if stretch.is_trained else READ_STYLE
        style = f"{style} {THOUGHT_STYLE}".strip() if stretch.is_thought else style
        text.append(f"»{shown}«" if stretch.is_trained else shown, CUT_STYLE if stretch.is_cut else style)
    for token in special_tokens:
        text.highlight_regex(re.escape(token), SPECIAL_STYLE)
    return text
