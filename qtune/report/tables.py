"""What a person reads before, between and after: small tables and lines, made from the values the run folder keeps."""

from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qtune.events import Finished, MemoryMeasured
from qtune.rundir import RunDir, read_json
from qtune.units import format_bytes, format_count, format_percent, format_seconds

SAMPLE_CHARACTERS = 600


def data_table(report: dict[str, Any]) -> RenderableType:
    """data.json in a few lines: what was read, what is trained, what was left out and why, and one real row."""
    lines = [_read_line(report), _token_line(report), *_left_out(report), *(Text(n) for n in report["notices"])]
    table = Table.grid(padding=(0, 2))
    for number, line in enumerate(lines):
        table.add_row(Text("data" if number == 0 else "", style="bold"), line)
    return Group(table, sample_panel(report["sample"]))


def _read_line(report: dict[str, Any]) -> Text:
    return Text(
        f"{report['rows_read']:,} rows read ({report['format']}): {report['train_rows']:,} to train on,"
        f" {report['held_out_rows']:,} held out"
    )


def _token_line(report: dict[str, Any]) -> Text:
    share = report["trained_tokens"] / max(1, report["tokens"])
    return Text(
        f"{format_count(report['tokens'])} tokens, {format_count(report['trained_tokens'])} trained"
        f" ({format_percent(share)}), longest row {report['longest_row_tokens']:,};"
        f" {report['packs']:,} sequences, {format_percent(report['pack_fill_fraction'])} full"
    )


def _left_out(report: dict[str, Any]) -> list[Text]:
    lines = [
        Text(f"{dropped['rows']:,} dropped: {dropped['reason']} ({', '.join(dropped['places'])})", style="yellow")
        for dropped in report["dropped"]
    ]
    if report["truncated_rows"]:
        lost = report["trained_tokens_lost"] / (report["trained_tokens"] + report["trained_tokens_lost"])
        lines.append(
            Text(f"{report['truncated_rows']:,} cut, {format_percent(lost)} of what would be trained", "yellow")
        )
    if report["duplicate_rows"]:
        lines.append(Text(f"{report['duplicate_rows']:,} rows stand there twice", style="yellow"))
    if report["overlap_rows"]:
        lines.append(Text(f"{report['overlap_rows']:,} held-out rows are trained on too", style="yellow"))
    return lines


def sample_panel(sample: list[tuple[str, bool]]) -> Panel:
    """One row as the model sees it; what is trained stands out in colour, and between » « without."""
    text = Text()
    for part, trained in sample:
        shown = _visible(part)
        if trained:
            text.append(f"»{shown}«", style="bold green")
        else:
            text.append(shown, style="dim")
    text.truncate(SAMPLE_CHARACTERS, overflow="ellipsis")
    return Panel(text, title="one row; »green« is trained", title_align="left", border_style="dim")


def _visible(text: str) -> str:
    """Control characters other than line breaks in a form that cannot move the cursor."""
    return "".join(c if c == "\n" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def plan_table(plan: dict[str, Any]) -> RenderableType:
    """Every settled choice, with why."""
    table = Table.grid(padding=(0, 2))
    for number, choice in enumerate(plan["choices"]):
        label = Text("plan" if number == 0 else "", style="bold")
        table.add_row(label, choice["name"], Text(choice["value"]), Text(choice["reason"], style="dim"))
    return table


def score_table(scores: dict[str, Any]) -> RenderableType:
    """Before and after, with the interval the score lies in, and answers side by side."""
    return Group(figures_table(scores), *(sample_table(sample) for sample in scores["samples"]))


def figures_table(scores: dict[str, Any]) -> Table:
    table = Table("", "base", "tuned", box=None, padding=(0, 3, 0, 0))
    losses = [f"{scores[who]['held_out_loss']:.4f}" for who in ("base", "tuned")]
    table.add_row("held-out loss", *losses)
    if scores["tuned"]["score"] is not None:
        cells = [score_text(scores[who]) for who in ("base", "tuned")]
        table.add_row(f"{scores['metric']} on {scores['rows']:,} rows", *cells)
    return table


def score_text(figures: dict[str, Any]) -> str:
    """`0.957 (0.93-0.98)`: the mean and its 95 % interval."""
    return f"{figures['score']:.3f} ({figures['low']:.2f}-{figures['high']:.2f})"


def sample_table(sample: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, style in (("prompt", "bold"), ("reference", "dim"), ("base", ""), ("tuned", "green")):
        table.add_row(Text(name, style="dim"), Text(_visible(sample[name]), style=style))
    table.add_row("")
    return table


def merge_table(report: dict[str, Any], verdict: dict[str, Any]) -> RenderableType:
    """What was written, and how close it is to the adapter it came from."""
    table = Table.grid(padding=(0, 2))
    written = f"{report['tensors']:,} tensors in {report['shards']} files, {format_bytes(report['bytes'])}"
    table.add_row("merged", f"onto the {report['onto']} base, {report['dtype']}, {written}: {report['output']}")
    for tried in report["measured"]:
        table.add_row("measured", f"{tried['onto']}: {_closeness(tried)}")
    table.add_row("verdict", Text(f"{'passed' if verdict['passed'] else 'FAILED'}: {_closeness(verdict)}"))
    same = sum(answer["same"] for answer in verdict["greedy"])
    table.add_row(
        "",
        f"held-out loss {verdict['live_loss']:.4f} live, {verdict['merged_loss']:.4f} merged;"
        f" {same} of {len(verdict['greedy'])} greedy answers the same",
    )
    return table


def _closeness(verdict: dict[str, Any]) -> str:
    return f"mean KL {verdict['mean_kl']:.1e} nats, same next token {format_percent(verdict['agreement_fraction'])}"


def memory_table(memory: MemoryMeasured) -> Table:
    table = Table.grid(padding=(0, 3))
    for name, size in memory.parts:
        table.add_row(name, format_bytes(size))
    table.add_row("peak", f"{format_bytes(memory.peak_bytes)} of {format_bytes(memory.total_bytes)}")
    return table


def end_of_run(run: RunDir) -> RenderableType:
    """What came out, and what one would type next."""
    events = list(run.events())
    seconds = sum(event.train_seconds for event in events if isinstance(event, Finished))
    peak = max((event.peak_bytes for event in events if isinstance(event, MemoryMeasured)), default=0)
    table = Table.grid(padding=(0, 3))
    if run.scores.is_file():
        table.add_row(figures_table(read_json(run.scores)))
    table.add_row(f"trained in {format_seconds(seconds)}, peak memory {format_bytes(peak)}, adapter in {run.adapter}")
    table.add_row("")
    for command, purpose in (
        (f"qtune chat {run.path} --compare", "talk to it"),
        (f"qtune merge {run.path} --output merged/{run.path.name}", "a plain model folder"),
        (f"qtune report {run.path}", "this again, and more"),
    ):
        table.add_row(Text.assemble((command, "bold"), f"   {purpose}"))
    return table
