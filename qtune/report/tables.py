"""What a person reads before and after a run: small tables, made from the values that the run folder keeps."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qtune.data.unused_columns import Unused, unused_line, unused_sentence
from qtune.evaluate.metrics import label
from qtune.events import MemoryMeasured
from qtune.report import memory_bar, run_record, sample_answers
from qtune.report.conclusions import lines as verdict_lines
from qtune.report.run_record import Record
from qtune.report.wording import canaries_told, cut_told, format_loss, format_score, one_line, visible
from qtune.rundir import RunDir
from qtune.units import counted, format_bytes, format_count, format_percent, format_seconds

PIECE_HEAD_CHARACTERS, PIECE_TAIL_CHARACTERS = 280, 120
MOST_COLUMNS = 76
TRAINED_STYLE, WARNING_STYLE = "bold green", "yellow"
ARROW = "→"
BOTH = ("base", "tuned")
OF_PAIRS = slice(1, 3)  # where the main figures have those of preferences, behind the loss


@dataclass(frozen=True)
class ToWidth:
    """Lines drawn for the width that there is, and for no more than a page is wide."""

    draw: Callable[[int], Sequence[Text]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.draw(min(MOST_COLUMNS, options.max_width))


def data_table(report: dict[str, Any]) -> RenderableType:
    """data.json in a few lines: what was read, what is trained, what was left out and why, and one real row."""
    table = grid(2)
    for name, line in (("data", _rows_line(report)), ("", _tokens_line(report)), ("", _packs_line(report))):
        table.add_row(Text(name, "bold"), line)
    add_notes(table, report)
    return Group(table, sample_panel(report["sample"])) if report["sample"] else table


def add_notes(table: Table, report: dict[str, Any]) -> None:
    """A row of `table` for each thing to know of the rows."""
    for name, told in (*source_rows(report), *canary_rows(report)):
        table.add_row(Text(), Text(f"{name}: {told}"))
    for warning in data_warnings(report):
        table.add_row(Text(), Text(warning, WARNING_STYLE))
    for notice in (*data_notices(report), *report["notices"]):
        table.add_row(Text(), Text(one_line(notice)))


def _rows_line(report: dict[str, Any]) -> Text:
    return Text(
        f"{counted(report['rows_read'], 'row')} of {one_line(report['source'])} ({report['format']}):"
        f" {report['train_rows']:,} to train on, {report['held_out_rows']:,} held out"
    )


def _tokens_line(report: dict[str, Any]) -> Text:
    share = format_percent(report["trained_tokens"] / max(1, report["tokens"]))
    return Text(
        f"{format_count(report['tokens'])} tokens, {format_count(report['trained_tokens'])} of them trained ({share}),"
        f" longest row {report['longest_row_tokens']:,}"
    )


def _packs_line(report: dict[str, Any]) -> Text:
    return Text(f"{counted(report['packs'], 'sequence')} a pass, {format_percent(report['pack_fill_fraction'])} full")


def canary_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What was planted among the rows to train on, by name and value; nothing where nothing was."""
    canaries = report.get("canaries")
    return (
        [("canaries", f"{canaries:,} planted, in {counted(report['canary_rows'], 'row')} beside these")]
        if canaries
        else []
    )


def data_warnings(report: dict[str, Any]) -> list[str]:
    """What was left out, cut, or stands there twice: a sentence each, none where all is well."""
    warnings = [
        f"{dropped['rows']:,} dropped: {one_line(dropped['reason'])} ({', '.join(map(one_line, dropped['places']))})"
        for dropped in report["dropped"]
    ]
    warnings += [
        f"{one_line(unused_sentence(each['field'], each['rows']))} {each['advice']}"
        for each in report.get("unused", ())
        if each["advice"]
    ]
    if report["truncated_rows"]:
        lost = report["trained_tokens_lost"] / max(1, report["trained_tokens"] + report["trained_tokens_lost"])
        warnings.append(
            f"{counted(report['truncated_rows'], 'row')} cut, {format_percent(lost)} of what would be trained"
        )
    if report["duplicate_rows"]:
        verb = "repeats" if report["duplicate_rows"] == 1 else "repeat"
        warnings.append(f"{counted(report['duplicate_rows'], 'row')} {verb} an earlier one")
    return warnings + ([overlap_told(report["overlap_rows"])] if report["overlap_rows"] else [])


def overlap_told(rows: int) -> str:
    """That so many held-out rows are among those to train on."""
    verb = "is" if rows == 1 else "are"
    return f"{counted(rows, 'held-out row')} {verb} trained on too, so the held-out loss flatters"


def data_notices(report: dict[str, Any]) -> list[str]:
    """What is good to know of the rows and nothing is wrong with: texts in pieces, columns that nobody reads."""
    harmless = [Unused(**each) for each in report.get("unused", ()) if not each["advice"]]
    cut = cut_told(report.get("cut_texts", 0), report.get("pieces", 0))
    return [*cut, *([f"Not used: {unused_line(harmless)}."] if harmless else [])]


def sample_panel(sample: Sequence[tuple[str, bool]]) -> Panel:
    """One row as the model is fed it; what is trained is coloured, and stands between » and « for want of colour."""
    text = Text()
    for piece, is_trained in sample:
        shown = shortened(visible(piece))
        text.append(f"»{shown}«" if is_trained else shown, TRAINED_STYLE if is_trained else "dim")
    text.rstrip()
    title = Text.assemble("one row: ", ("»this«", TRAINED_STYLE), " is trained, the rest is only read")
    return Panel(text, title=title, title_align="left", border_style="dim")


def shortened(text: str) -> str:
    """The beginning and the end of a long text, and how much is left out between."""
    left_out = len(text) - PIECE_HEAD_CHARACTERS - PIECE_TAIL_CHARACTERS
    if left_out <= PIECE_TAIL_CHARACTERS:
        return text
    return f"{text[:PIECE_HEAD_CHARACTERS]} … {left_out:,} characters … {text[-PIECE_TAIL_CHARACTERS:]}"


def plan_table(plan: dict[str, Any]) -> RenderableType:
    """Every settled choice, with its reason."""
    table = grid(4)
    for number, choice in enumerate(plan["choices"]):
        name, value, reason = (one_line(choice[key]) for key in ("name", "value", "reason"))
        table.add_row(Text("plan" if number == 0 else "", "bold"), Text(name), Text(value), Text(reason, "dim"))
    return table


def score_table(scores: dict[str, Any]) -> RenderableType:
    """Before and after, then answers side by side: samples, and where the tuned model did worst."""
    table = grid(2)
    for name, value in score_rows(scores):
        table.add_row(Text(name), Text(value, "bold"))
    return Group(table, *sample_answers.drawn(scores, sample_answers.side_by_side))


def score_rows(scores: dict[str, Any]) -> list[tuple[str, str]]:
    """(`held-out loss`, `2.113 → 1.246`); where a metric was asked for the same of it with 95 % intervals, and by how
    much it rose on the same rows."""
    rows = [(name, f"{base} {ARROW} {tuned}") for name, base, tuned in score_cells(scores)]
    if scores.get("difference"):
        rows.insert(len(main_cells(scores)), ("difference", difference(scores["difference"])))
    if scores.get("preferred_difference"):
        rows.insert(OF_PAIRS.stop, ("more often", difference(scores["preferred_difference"])))
    return rows


def result_rows(found: Record) -> list[tuple[str, str]]:
    """What came out: the scores, and what was told of the canaries."""
    scores = score_rows(found.scores) if found.scores else []
    return [*scores, ("canaries", canaries_told(found.memorised))] if found.memorised else scores


def score_cells(scores: dict[str, Any], names: Sequence[str] = BOTH) -> list[tuple[str, ...]]:
    """(what, one figure a model) of the main figures, of what the metric is made of, and of what was forgotten."""
    figures = [scores[name] for name in names]
    parts = dict.fromkeys(name for each in figures for name in each.get("parts", ()))
    rows = main_cells(scores, names) + [
        (f"loss on {one_line(name)}", *(_of_source(each, name) for each in figures))
        for name in figures[-1].get("by_source", ())
    ]
    rows += [(name, *(_part(each, name) for each in figures)) for name in parts]
    if figures[-1].get("general_loss") is not None:
        rows.append(("loss on general text", *(format_loss(each["general_loss"]) for each in figures)))
    return rows


def main_cells(
    scores: dict[str, Any], names: Sequence[str] = BOTH, has_intervals: bool = True
) -> list[tuple[str, ...]]:
    """(what, one figure a model) of the held-out loss, and of the metric, with its intervals or without, where one was
    asked for."""
    figures = [scores[name] for name in names]
    loss = "loss" if "data" in scores else "held-out loss"
    rows: list[tuple[str, ...]] = [(loss, *(format_loss(each["held_out_loss"]) for each in figures))]
    if "preferred" in figures[-1]:
        rows[OF_PAIRS] = _preference_cells([each["preferred"] for each in figures], has_intervals)
    if figures[-1]["score"] is not None:
        means = map(with_interval, figures) if has_intervals else (format_score(each["score"]) for each in figures)
        rows.append((f"{label(scores['metric']).name} on {counted(scores['rows'], 'row')}", *means))
    return rows


def _preference_cells(figures: Sequence[dict[str, Any]], has_intervals: bool) -> list[tuple[str, ...]]:
    """In what share of held-out pairs the chosen answer is the likelier one, and by how much on average."""
    shares = map(with_interval, figures) if has_intervals else (format_score(each["score"]) for each in figures)
    margins = (f"{each['margin']:+.3f}" for each in figures)
    return [("chosen answer preferred", *shares), ("its margin, nats a token", *margins)]


def _part(figures: dict[str, Any], name: str) -> str:
    """One of the things that a score is made of; empty where no row has it."""
    value = figures.get("parts", {}).get(name)
    return "" if value is None else format_score(value)


def _of_source(figures: dict[str, Any], name: str) -> str:
    """The loss over the rows of a source; empty where it was not measured."""
    value = figures.get("by_source", {}).get(name)
    return "" if value is None else format_loss(value)


def source_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What each of several sources gives, by name; nothing where there is one."""
    return [(one_line(each["name"]), _source_told(each, report)) for each in report.get("sources", ())]


def _source_told(each: dict[str, Any], report: dict[str, Any]) -> str:
    share = format_percent(each["tokens"] / max(1, report["tokens"]))
    left = f", {each['left_out_rows']:,} left out for its share" if each["left_out_rows"] else ""
    weight = f", each token counts {each['weight']:g}" if each["weight"] != 1 else ""
    return (
        f"{counted(each['rows_read'], 'row')} ({each['format']}): {each['train_rows']:,} to train on, {share} of the"
        f" tokens, {each['held_out_rows']:,} held out{left}{weight}"
    )


def difference(figures: dict[str, float]) -> str:
    """`+0.221 (+0.190 to +0.252)`: the rise on the same rows, and its interval; in words where it may be none."""
    low, high = figures["low"], figures["high"]
    if low == high == 0:
        return "none, every row scored the same"
    told = f"{figures['score']:+.3f} ({low:+.3f} to {high:+.3f})"
    return f"{told}, which may be chance" if low <= 0 <= high else told


def with_interval(figures: dict[str, Any]) -> str:
    """`0.402 (0.36-0.45)`: the mean and the interval it lies in."""
    low, high = figures["low"], figures["high"]
    return format_score(figures["score"]) + (f" ({low:.2f}-{high:.2f})" if low is not None and high is not None else "")


def merge_table(report: dict[str, Any], verdict: dict[str, Any]) -> RenderableType:
    """What was written, and how close it is to the adapter it came from."""
    table = grid(2)
    for name, value in merge_rows(report, verdict):
        if name == "verdict":
            outcome = Text("passed", "green") if verdict["passed"] else Text("FAILED", "bold red")
            table.add_row(name, outcome.append(f": {value}", "default"))
        else:
            table.add_row(name, Text(value))
    return table


def merge_rows(report: dict[str, Any], verdict: dict[str, Any]) -> list[tuple[str, str]]:
    """merge.json by name and value; whether it passed is for the reader of `verdict` to colour."""
    pieces = f"{counted(report['tensors'], 'tensor')} in {counted(report['shards'], 'file')}"
    written = f"{pieces}, {format_bytes(report['bytes'])}"
    same = sum(answer["same"] for answer in verdict["greedy"])
    return [
        ("merged", f"onto the {report['onto']} base, {report['dtype']}, {written}: {report['output']}"),
        *(("measured", f"{tried['onto']}: {closeness(tried)}") for tried in report["measured"]),
        ("verdict", closeness(verdict)),
        *_beside_rounding(verdict),
        (
            "",
            f"loss over every token of held-out rows {verdict['live_loss']:.4f} live, {verdict['merged_loss']:.4f}"
            f" merged; {same} of {len(verdict['greedy'])} greedy answers the same",
        ),
    ]


def _beside_rounding(verdict: dict[str, Any]) -> list[tuple[str, str]]:
    """What was proven of the weights, what the fold costs before they are rounded, what tuning changed, and what does
    not hold; a merge of another version was not asked."""
    fold_kl, base_kl, finer = (verdict.get(name) for name in ("fold_kl", "base_kl", "float16_kl"))
    told = [] if fold_kl is None else [f"before its weights were rounded: mean KL {fold_kl:.1e} nats"]
    told += [] if base_kl is None else [f"tuning itself moved it by a mean KL of {base_kl:.1e} nats"]
    if finer:
        told.append(f"in float16 mean KL {finer:.1e} nats, for a server that computes in it: --dtype float16")
    rows = [("", line) for line in told]
    faults = [("fault", fault) for fault in verdict.get("faults", ())]
    return [*_weights_rows(verdict), *rows, *faults]


def _weights_rows(verdict: dict[str, Any]) -> list[tuple[str, str]]:
    """How many weights were held against the live model's, and found to be them."""
    found = verdict.get("weights")
    if not found:
        return []
    right = "all" if not found["strays"] else f"{found['weights'] - found['strays']:,}"
    return [("weights", f"{right} of {found['weights']:,} are the live model's, rounded once")]


def closeness(verdict: dict[str, Any]) -> str:
    """How near a merged model is to the adapter it came from."""
    return f"mean KL {verdict['mean_kl']:.1e} nats, same next token {format_percent(verdict['agreement_fraction'])}"


def export_table(report: dict[str, Any]) -> RenderableType:
    """What was written, how it was proven, and how to serve it."""
    table = grid(2)
    for name, told in export_rows(report):
        table.add_row(name, Text(told))
    outcome, passed = export_outcome(report)
    table.add_row("verdict", Text(outcome, {True: "green", False: "bold red", None: WARNING_STYLE}[passed]))
    for note in report["notes"]:
        table.add_row("", Text(note, WARNING_STYLE))
    return Group(table, Text(), *command_lines([serve_command(report)]))


def export_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The report of an export by name and value, but for whether it passed and its notes."""
    stored = ", ".join(f"{count} {kind}" for kind, count in report["stored"].items())
    file = f"{report['output']}/{report['file']}"
    return [
        ("exported", f"{file}, {format_bytes(report['bytes'])}: {stored} tensors, {_origin(report)}"),
        ("read back", _read_back(report["read_back"]) + _texts(report["texts"], report["verdict"])),
        *(_verdict_rows(report["to"], report["verdict"]) if report["verdict"] else ()),
        *(("fault", fault) for fault in report.get("faults", ())),
    ]


def export_outcome(report: dict[str, Any]) -> tuple[str, bool | None]:
    """How an export came out, in words, and whether it passed: None where llama.cpp was not asked."""
    if not report["passed"]:
        return "FAILED", False
    return ("passed", True) if report["verdict"] else ("read back, and not asked of llama.cpp", None)


def _read_back(read: dict[str, Any]) -> str:
    told, worst = counted(read["tensors"], "tensor"), read["worst_fraction"]
    if not worst <= 1:
        return f"{told}, and {read['worst_tensor']} is not what was to be written"
    return f"{told}, the worst {format_percent(worst)} of what its type may cost"


def _texts(count: int, verdict: dict[str, Any] | None) -> str:
    """Whether texts become the tokens of training, and who says so."""
    if not count:
        return ""
    if verdict and verdict.get("differing_texts"):
        return f"; {len(verdict['differing_texts']):,} of {count:,} texts become other tokens in llama.cpp"
    read_by = "in llama.cpp" if verdict else "as qtune reads the file"
    return f"; {counted(count, 'text')} {'becomes' if count == 1 else 'become'} the same tokens {read_by}"


def _origin(report: dict[str, Any]) -> str:
    return "the LoRA alone" if report["to"] == "adapter-gguf" else f"folded onto the {report['onto']} base"


def _verdict_rows(to: str, verdict: dict[str, Any]) -> list[tuple[str, str]]:
    same = sum(answer["same"] for answer in verdict["greedy"])
    beside = f"on the run's base in f16, which alone has KL {verdict['base_kl']:.2g}: " if to == "adapter-gguf" else ""
    return [
        *_weights_rows(verdict),
        (
            "llama.cpp",
            f"{beside}{closeness(verdict)} and another as likely {format_percent(verdict['near_tie_fraction'])} of"
            f" {verdict['positions']:,} positions",
        ),
        (
            "",
            f"loss over every token of held-out rows {verdict['live_loss']:.4f} live, {verdict['file_loss']:.4f} in"
            f" llama.cpp; {same} of {len(verdict['greedy'])} greedy answers the same; the file ends"
            f" {verdict['ends_found']:,} of the {verdict['ends']:,} answers that the live model ends",
        ),
    ]


def serve_command(report: dict[str, Any]) -> str:
    """Ready to paste."""
    folder, file = (shlex.quote(text) for text in (report["output"], f"{report['output']}/{report['file']}"))
    if report["to"] == "ollama":
        return f"ollama create {shlex.quote(Path(report['output']).name)} -f {folder}/Modelfile"
    return f"llama-server -m base.gguf --lora {file}" if report["to"] == "adapter-gguf" else f"llama-server -m {file}"


def memory_table(memory: MemoryMeasured) -> RenderableType:
    """The device at the peak: the dashboard's bar, and the bytes of each part."""
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column()
    table.add_column()
    table.add_column(justify="right")
    for fill, name, size in memory_bar.legend(memory):
        table.add_row(Text(*fill), Text(name), size)
    return Group(ToWidth(lambda width: [memory_bar.stacked(memory, width)]), table)


def end_of_run(run: RunDir) -> RenderableType:
    """What came out, where it is, and the commands one would type next."""
    found = run_record.read(run)
    table = grid(2)
    if found.stopped:
        table.add_row(Text(found.stopped, "bold yellow"))
    if found.done_early:
        table.add_row("training was", found.done_early)
    for name, value in result_rows(found):
        table.add_row(Text(name), Text(value, "bold"))
    if found.memory:
        table.add_row("peak memory", memory_bar.peak_of_total(found.memory))
    if found.train_seconds is not None:
        table.add_row("training took", format_seconds(found.train_seconds))
    table.add_row("adapter", Text(str(run.adapter) if found.has_adapter else "none was saved", overflow="fold"))
    told = [Text(), *verdict_lines(found)] if found.scores else []
    return Group(*told, Text(), table, Text(), *command_lines(next_commands(found)))


def command_lines(commands: Sequence[str]) -> list[Text]:
    """Each on one line, whatever the width: a command that is folded is two when it is pasted. Print with crop=False,
    and outside of tables."""
    return [Text(f"  {command}", "bold", no_wrap=True, overflow="ignore") for command in commands]


def next_commands(found: Record) -> list[str]:
    """What one would type next; to go on with it comes first where it was stopped."""
    then = NextCommands.of(found.run)
    to_go_on = [then.resume] if found.stopped or not found.finished else []
    return [*to_go_on, *([then.chat, then.merge, then.export] if found.has_adapter else []), then.report]


class NextCommands(NamedTuple):
    """Ready to paste: go on with it, talk to it, fold it into its base, make a GGUF file of it, look at it again."""

    resume: str
    chat: str
    merge: str
    export: str
    report: str

    @classmethod
    def of(cls, run: RunDir) -> "NextCommands":
        folder, merged = shlex.quote(str(run.path)), shlex.quote(f"merged/{run.path.resolve().name}")
        merge = f"qtune merge {folder} --output {merged}"
        export = f"qtune export {folder} --to gguf"
        return cls(f"qtune resume {folder}", f"qtune chat {folder}", merge, export, f"qtune report {folder}")


def grid(columns: int) -> Table:
    """A table without lines; the last column takes what is left and folds."""
    table = Table.grid(padding=(0, 3, 0, 0))
    for column in range(columns):
        table.add_column(overflow="fold", no_wrap=column == 0)
    return table
