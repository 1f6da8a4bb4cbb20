import copy
import io
from pathlib import Path
from typing import Any

import pytest
from made_events import DATA, LOCK, PLAN, SCORES, start_run, whole_run_in
from rich.console import Console, RenderableType

from qtune.events import Finished, Memorised
from qtune.report import conclusions, html_page, model_card, run_record, serving_snippets, summary, tables
from qtune.rundir import RunDir, read_json, write_json


@pytest.fixture
def started_run(tmp_path: Path) -> RunDir:
    return start_run(tmp_path)


@pytest.fixture
def whole_run(tmp_path: Path) -> RunDir:
    return whole_run_in(tmp_path)


def shown(renderable: RenderableType, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@pytest.fixture
def data(whole_run: RunDir) -> dict[str, Any]:
    return read_json(whole_run.data)  # type: ignore[no-any-return]


@pytest.fixture
def scores(whole_run: RunDir) -> dict[str, Any]:
    return read_json(whole_run.scores)  # type: ignore[no-any-return]


def test_the_data_in_a_few_lines(data: dict[str, Any]) -> None:
    text = shown(tables.data_table(data))
    for fact in (
        "3,000 rows of rows.jsonl (prompt-completion): 2,850 to train on, 148 held out",
        "412k tokens, 286k of them trained (69.5 %), longest row 1,911",
        "214 sequences a pass, 96.3 % full",
        "2 dropped: the answer is empty (rows.jsonl:17, rows.jsonl:212)",
        "14 rows cut, 0.3 % of what would be trained",
        "3 rows repeat an earlier one",
        "so [system] texts go before",
    ):
        assert fact in text
    assert "trained on too" not in text


def test_what_of_the_rows_is_not_used_is_told_before_a_run(data: dict[str, Any]) -> None:
    """`reasoning_content` was not in the rows that were trained on, and nothing said so."""
    data["unused"] = [
        {"field": "reasoning_content", "rows": 40, "advice": "The answer is learned without it."},
        {"field": "id", "rows": 1, "advice": None},
    ]
    data |= {"cut_texts": 2, "pieces": 1130}
    text = " ".join(shown(tables.data_table(data)).split())
    assert "`reasoning_content` stands in 40 rows and is not used. The answer is learned without it." in text
    assert "Not used: `id` (1 row)." in text
    assert "2 texts cut into 1,130 pieces" in text
    assert tables.data_warnings(data)[1].startswith("`reasoning_content`")


def test_what_is_trained_is_marked_without_colour_and_explained(data: dict[str, Any]) -> None:
    text = shown(tables.data_table(data))
    assert "»A beta blocker.<|im_end|>«" in text
    assert text.count("»") == 2
    assert "»this« is trained" in text


def test_text_of_rows_is_neither_markup_nor_control(data: dict[str, Any]) -> None:
    data["sample"] = [["[bold red]x[/] [/nothing]\x1b[2J\r", False], ["漢字\u202e", True]]
    data["notices"] = ["[/]"]
    text = shown(tables.data_table(data))
    assert "[bold red]x[/] [/nothing]␛[2J␍»漢字\\u202e«" in text
    assert "\x1b" not in text


def test_a_long_row_shows_its_trained_end(data: dict[str, Any]) -> None:
    data["sample"] = [["question " * 4_000, False], ["the answer", True]]
    text = shown(tables.data_table(data))
    assert "35,600 characters …" in " ".join(text.replace("│", " ").split())
    assert "»the answer«" in text


def test_a_clean_report_has_no_warnings(data: dict[str, Any]) -> None:
    clean = {"dropped": [], "truncated_rows": 0, "duplicate_rows": 0, "overlap_rows": 0, "notices": [], "sample": []}
    assert tables.data_warnings({**data, **clean}) == []
    assert len(shown(tables.data_table({**data, **clean})).splitlines()) == 3


def test_the_plan_gives_each_choice_its_reason(whole_run: RunDir) -> None:
    plan = read_json(whole_run.plan)
    plan["choices"].append({"name": "[x]", "value": "[/]", "reason": "[bold]"})
    rows = [line.split("   ") for line in shown(tables.plan_table(plan)).splitlines()]
    assert len(rows) == 4
    assert [cell.strip() for cell in rows[3] if cell.strip()] == ["[x]", "[/]", "[bold]"]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_before_and_after_with_intervals_and_answers_side_by_side(scores: dict[str, Any], width: int) -> None:
    lines = shown(tables.score_table(scores), width).splitlines()
    flat = " ".join(" ".join(lines).split())
    assert "held-out loss 2.113 → 1.246" in flat
    assert all(len(line) <= width for line in lines)
    assert any(line.startswith("base, 0.080") and "tuned, 1.000" in line for line in lines)
    if width >= 80:
        assert "shared words on 100 rows 0.181 (0.15-0.21) → 0.402 (0.36-0.45)" in flat
        assert any(line.startswith("The ending -olol") and line.rstrip().endswith("A beta blocker.") for line in lines)


def test_without_a_metric_only_the_loss_is_compared(scores: dict[str, Any]) -> None:
    bare = copy.deepcopy(scores)
    bare["samples"] = []
    for who in ("base", "tuned"):
        bare[who] |= {"score": None, "low": None, "high": None}
    assert tables.score_rows(bare) == [("held-out loss", "2.113 → 1.246")]


def test_what_a_score_is_made_of_and_what_was_forgotten_stand_under_it(scores: dict[str, Any]) -> None:
    made = copy.deepcopy(scores)
    made["base"] |= {"parts": {"parses": 0.25}, "general_loss": 3.5}
    made["tuned"] |= {"parts": {"parses": 1.0, "passes": 0.5}, "general_loss": 3.6204}
    assert tables.score_rows(made)[2:] == [
        ("parses", "0.250 → 1.000"),
        ("passes", " → 0.500"),
        ("loss on general text", "3.500 → 3.620"),
    ]


def test_the_end_of_a_run_says_what_came_out_and_what_to_type_next(whole_run: RunDir) -> None:
    lines = [line.strip() for line in shown(tables.end_of_run(whole_run), 240).splitlines()]
    run = whole_run.path
    assert [" ".join(line.split()) for line in lines if line] == [
        conclusions.lines(run_record.read(whole_run))[0].plain,
        "What it forgot was not measured.",
        "held-out loss 2.113 → 1.246",
        "shared words on 100 rows 0.181 (0.15-0.21) → 0.402 (0.36-0.45)",
        "peak memory 4.8 GiB of 8.0 GiB",
        "training took 18 min 24 s",
        f"adapter {run}/adapter",
        f"qtune chat {run}",
        f"qtune merge {run} --output merged/medical-1",
        f"qtune export {run} --to gguf",
        f"qtune report {run}",
    ]


def test_a_run_that_ended_early_promises_nothing(started_run: RunDir) -> None:
    lines = [" ".join(line.split()) for line in shown(tables.end_of_run(started_run), 240).splitlines()]
    assert [line for line in lines if line] == [
        "adapter none was saved",
        f"qtune resume {started_run.path}",
        f"qtune report {started_run.path}",
    ]


def stopped_in(folder: Path, name: str) -> RunDir:
    """A run that was stopped at step 7, with an adapter."""
    run = RunDir.create(folder / name, 'name = "medical"\n', {})
    for path, value in ((run.data, DATA), (run.plan, PLAN), (run.lock, LOCK)):
        write_json(path, value)
    run.record(Finished(7, 61.0))
    run.adapter.mkdir()
    return run


def test_a_run_that_was_stopped_says_so_and_how_to_go_on(tmp_path: Path) -> None:
    """It said `7 steps done`, and named chat, merge, export and report."""
    run = stopped_in(tmp_path, "medical-1")
    lines = [line.strip() for line in shown(tables.end_of_run(run), 240).splitlines() if line.strip()]
    assert lines[0] == "stopped at step 7 of 282"
    verbs = [line.split()[1] for line in lines if line.startswith("qtune ")]
    assert verbs == ["resume", "chat", "merge", "export", "report"]
    told = shown(summary.report(run), 240)
    assert "stopped at step 7 of 282" in told
    assert f"  qtune resume {run.path}\n" in told
    summary.write_summary(run)
    assert f"Stopped at step 7 of 282. Next:\n\n```sh\nqtune resume {run.path}\nqtune chat" in run.summary.read_text()
    assert serving_snippets.uses(run_record.read(run))[0].text == f"qtune resume {run.path}"


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_command_is_one_line_at_any_width(tmp_path: Path, width: int, is_terminal: bool) -> None:
    """Folded at the edge it was two commands when it was pasted, out of a pipe too."""
    run = stopped_in(tmp_path, "a name that is quoted and as long as those of runs that are named by date and time")
    export = {"to": "ollama", "output": f"exports/{run.path.name}", "file": "model.gguf", "onto": "original"}
    export |= {"stored": {}, "bytes": 9, "texts": 0, "verdict": None, "passed": True, "notes": []}
    export |= {"read_back": {"tensors": 9, "worst_fraction": 0.1}}
    for renderable, commands in (
        (tables.end_of_run(run), tables.next_commands(run_record.read(run))),
        (summary.report(run), tables.next_commands(run_record.read(run))),
        (tables.export_table(export), [tables.serve_command(export)]),
    ):
        console = Console(file=io.StringIO(), width=width, force_terminal=is_terminal, color_system=None)
        console.print(renderable, crop=False)
        lines = [line.strip() for line in console.file.getvalue().splitlines()]
        assert all(command in lines for command in commands)


def test_commands_can_be_pasted_whatever_the_folder_is_called(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "my run; rm")
    assert tables.NextCommands.of(run).chat == f"qtune chat '{tmp_path}/my run; rm'"
    assert tables.NextCommands.of(run).merge.endswith("--output 'merged/my run; rm'")


def test_figures_of_a_merge(whole_run: RunDir) -> None:
    measured = {
        "onto": "dequantised",
        "mean_kl": 5.6e-6,
        "agreement_fraction": 0.998,
        "live_loss": 1.2461,
        "merged_loss": 1.2462,
        "passed": True,
        "greedy": [{"same": True}, {"same": False}],
    }
    report = {"tensors": 290, "shards": 1, "bytes": 10**7, "onto": "dequantised", "dtype": "float16", "measured": []}
    report |= {"output": "merged/[x]", "verdict": measured}
    text = shown(tables.merge_table(report, measured), 120)
    assert "merged/[x]" in text
    assert "passed: mean KL 5.6e-06 nats, same next token 99.8 %" in text
    assert "FAILED" in shown(tables.merge_table(report, {**measured, "passed": False}), 120)
    write_json(whole_run.merge, report)


@pytest.mark.parametrize(
    ("score", "low", "high", "told"),
    [
        (0.221, 0.19, 0.252, "+0.221 (+0.190 to +0.252)"),
        (-0.1, -0.2, -0.05, "-0.100 (-0.200 to -0.050)"),
        (0.02, -0.01, 0.05, "+0.020 (-0.010 to +0.050), which may be chance"),
        (0.0, 0.0, 0.0, "none, every row scored the same"),
    ],
)
def test_a_difference_says_when_it_may_be_none(score: float, low: float, high: float, told: str) -> None:
    figures = {"score": score, "low": low, "high": high}
    assert tables.difference(figures) == told
    assert tables.score_rows({**SCORES, "difference": figures})[-1] == ("difference", told)


def test_canaries_are_told_of_wherever_a_run_is(whole_run: RunDir, data: dict[str, Any]) -> None:
    assert tables.canary_rows(data) == []
    planted = {**data, "canaries": 10, "canary_rows": 40}
    assert "canaries: 10 planted, in 40 rows beside these" in shown(tables.data_table(planted))
    write_json(whole_run.data, planted)
    whole_run.record(Memorised(10, 4, 3, 0, 5.2, 1.4, 7.0, 8.0))
    told = "3 of 10 secrets planted in 4 rows each were told, 0 of 10 never planted; exposure 5.2 against 1.4 of 7 bits"
    assert tables.result_rows(run_record.read(whole_run))[-1] == ("canaries", told)
    assert f"<p>{told}.</p>" in html_page.run_page(whole_run)
    assert told in " ".join(shown(summary.report(whole_run)).split())
    whole_run.scores.unlink()
    assert tables.result_rows(run_record.read(whole_run)) == [("canaries", told)]
    assert told in model_card.card(run_record.read(whole_run))
