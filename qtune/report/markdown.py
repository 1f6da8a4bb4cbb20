"""Text from outside inside Markdown: it cannot end the cell, the fence or the line it stands in."""

import re
from collections.abc import Sequence

from qtune.report.wording import one_line, visible


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table and an empty line."""
    cells = [[inline(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (list(head), ["---"] * len(head), *cells)] + [""]


def inline(text: str) -> str:
    """`text` on one line, where it cannot end a table cell or begin an HTML tag."""
    return one_line(text).replace("|", "\\|").replace("<", "&lt;")


def fenced(text: str, language: str = "") -> list[str]:
    """`text` as a code block, fenced by more backticks than it holds in a row."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", visible(text), fence]
