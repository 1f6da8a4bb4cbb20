"""How long the rows are, as bars of text and as a picture."""

from pathlib import Path

from rich.table import Table
from rich.text import Text

from qtune.audit.length_stats import Bar, TokenCounts
from qtune.errors import MachineError, UserError, how_to_install

BAR_CHARACTERS = 40
PICTURE_NAME = "tokens.png"
EIGHTHS = " ▏▎▍▌▋▊▉"


def histogram(tokens: TokenCounts) -> Table:
    """A line for each range of lengths; those that data.max_tokens cuts into or leaves out say so."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right")
    table.add_column(width=BAR_CHARACTERS)
    table.add_column(justify="right")
    table.add_column()
    table.add_row(Text("tokens a row", "bold"), "", Text("rows", "bold"), "")
    most = max(bar.rows for bar in tokens.bars)
    for bar in tokens.bars:
        note = _note(bar, tokens)
        style = "yellow" if note else "green"
        blocks = Text(_bar(bar.rows / most), style)
        table.add_row(f"{bar.low:,}–{bar.high:,}", blocks, f"{bar.rows:,}", Text(note, style))
    return table


def _note(bar: Bar, tokens: TokenCounts) -> str:
    if bar.low > tokens.max_tokens:
        return "over"
    is_parted = tokens.long_rows > 0 and bar.high > tokens.max_tokens
    return f"data.max_tokens = {tokens.max_tokens:,}" if is_parted else ""


def _bar(share: float) -> str:
    """As many blocks as `share` of the width, to an eighth of one; something for anything."""
    eighths = max(round(share * BAR_CHARACTERS * 8), share > 0)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def picture_path(given: Path) -> Path:
    """The file to draw into: `given`, or tokens.png in it where it is a folder.

    Raises MachineError without matplotlib, UserError for a place that does not exist; call it before the long work.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MachineError(f"--plot: matplotlib is not installed: {how_to_install('plots')}") from None
    path = given / PICTURE_NAME if given.is_dir() else given
    if not path.parent.is_dir():
        raise UserError(f"--plot: there is no folder {path.parent}.")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot: {path} must end in .png, .svg or .pdf, or be a folder that exists.")
    return path


def draw(tokens: TokenCounts, path: Path) -> None:
    """The histogram as a picture, with a line at data.max_tokens. Raises MachineError where it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    edges = [bar.low for bar in tokens.bars]
    widths = [bar.high - bar.low + 1 for bar in tokens.bars]
    axes.bar(edges, [bar.rows for bar in tokens.bars], widths, align="edge", edgecolor="white", color="#2a7f62")
    axes.axvline(tokens.max_tokens, color="#c44e52", linestyle="--", label=f"data.max_tokens = {tokens.max_tokens:,}")
    axes.set(xscale="log", xlabel="tokens in a row", ylabel="rows")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except OSError as fault:
        raise MachineError(f"--plot: {path} cannot be written ({fault.strerror}).") from None
