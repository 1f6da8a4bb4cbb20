"""The page of a run: whole in itself, safe whatever the run holds, bounded, and telling what summary.md tells."""

import dataclasses
import json
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_events import DATA, LOCK, PLAN, SCORES, events_of_a_run, start_run, whole_run_in

from qtune.errors import UserError
from qtune.events import MemoryMeasured, Rehearsed, StepDone
from qtune.report import compare_runs, html_page, run_charts, run_record, summary, tables
from qtune.rundir import RunDir, write_json

GIB = 1024**3
EVIL = "</pre></style><script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}"
VOID = {"meta", "link", "img", "br", "hr", "input", "path", "rect"}


class Page(HTMLParser):
    """What is in a page: its tags, its text, and whether everything that is opened is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def of(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


@pytest.fixture
def whole_run(tmp_path: Path) -> RunDir:
    return whole_run_in(tmp_path)


def on_a_card(run: RunDir) -> RunDir:
    forecast = {"device": {"base": 3 * GIB, "context": 2 * GIB}, "host": {}}
    write_json(run.plan, {**PLAN, "device": {"name": "cuda:0"}, "forecast": forecast})
    return run


def test_it_tells_the_run_as_summary_md_does(whole_run: RunDir) -> None:
    text = Page(html_page.run_page(whole_run)).text
    found = run_record.read(whole_run)
    facts: list[str] = [*(word for row in tables.score_cells(SCORES) for word in row), summary.pace(found)]
    facts += [value for _, value in summary.data_rows(DATA)]
    facts += [word for row in summary.plan_rows(PLAN) for word in row]
    facts += [word for row in summary.loss_rows(found) for word in row if word]
    facts += [LOCK["base"]["sha256"], "torch 2.13.0, peft 0.21.2", "Answers medical questions briefly"]
    for fact in facts:
        assert " ".join(fact.split()) in text


def test_it_needs_nothing_from_elsewhere_and_forbids_itself_to_ask(whole_run: RunDir) -> None:
    text = html_page.run_page(whole_run)
    found = Page(text)
    assert not found.of("script", "link", "img", "iframe", "object", "embed", "audio", "video", "base", "form")
    assert not [
        name for attributes in found.of("a", "svg", "path", "rect", "div") for name in attributes if "href" in name
    ]
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert "url(" not in text
    assert "@import" not in text
    policy = [a["content"] for a in found.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_it_is_well_formed_and_says_what_it_is_to_those_who_do_not_see_it(whole_run: RunDir) -> None:
    found = Page(html_page.run_page(on_a_card(whole_run)))
    assert found.open == []
    assert found.of("html")[0] == {"lang": "en"}
    assert len(found.of("h1")) == 1
    ids = [attributes["id"] for _, attributes in found.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    assert {attributes.get("aria-labelledby") for attributes in found.of("section")} <= set(ids)
    pictures_of_it = found.of("svg")
    assert len(pictures_of_it) == 3
    assert all(svg["role"] == "img" and len(svg["aria-label"] or "") > 20 for svg in pictures_of_it)
    assert all(cell.get("scope") in ("row", "col") for cell in found.of("th"))


def evil_run(folder: Path) -> RunDir:
    """A run whose every text is an attack."""
    run = whole_run_in(folder)
    sample = {**SCORES["samples"][0], "prompt": EVIL, "reference": EVIL, "base": EVIL, "tuned": EVIL}
    verdict = {"passed": True, "mean_kl": 1e-6, "agreement_fraction": 1.0, "live_loss": 1.0, "merged_loss": 1.0}
    merge = {"onto": EVIL, "dtype": EVIL, "tensors": 1, "shards": 1, "bytes": 1, "output": EVIL, "measured": []}
    rows: dict[Path, Any] = {
        run.scores: {**SCORES, "metric": EVIL, "samples": [sample]},
        run.lock: {**LOCK, "name": EVIL, "recipe": {"about": EVIL}, "versions": {EVIL: EVIL}},
        run.data: {**DATA, "source": EVIL, "format": EVIL, "notices": [EVIL], "sample": [[EVIL, True], [EVIL, False]]},
        run.plan: {**PLAN, "choices": [{"name": EVIL, "value": EVIL, "reason": EVIL}]},
        run.merge: {**merge, "verdict": {**verdict, "greedy": []}},
        run.path / "export.json": {EVIL: EVIL, "passed": False},
    }
    for path, value in rows.items():
        write_json(path, value)
    run.recipe.write_text(EVIL)
    run.record(MemoryMeasured(300, ((EVIL, 6 * GIB),), 7 * GIB, 8 * GIB, GIB, EVIL))
    return run


def test_no_text_of_the_run_becomes_markup(tmp_path: Path) -> None:
    plain, evil = whole_run_in(tmp_path / "plain"), evil_run(tmp_path / "evil")
    text = html_page.run_page(evil)
    found = Page(text)
    assert found.open == []
    assert {tag for tag, _ in found.tags} <= {tag for tag, _ in Page(html_page.run_page(plain)).tags} | {"mark", "h3"}
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert "<script" not in text
    assert "{{ 7 * 7 }}" in text  # shown, not run
    assert "<script>alert(1)</script>" in found.text
    comparison = html_page.comparison_page(compare_runs.compare([plain, evil]))
    assert "<script" not in comparison
    assert Page(comparison).open == []


def test_control_characters_are_shown_and_not_sent(whole_run: RunDir) -> None:
    text = html_page.run_page(whole_run)
    assert "\x1b" not in text
    assert "␛[2J" in text


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_short_runs_have_their_charts(tmp_path: Path, steps: int) -> None:
    run = start_run(tmp_path)
    for event in events_of_a_run(steps):
        run.record(event)
    assert len(Page(html_page.run_page(run)).of("svg")) == 3


def test_a_long_run_makes_no_long_page(tmp_path: Path) -> None:
    """200,000 steps and as many measurements, and a sample as long as a book."""
    run = whole_run_in(tmp_path)
    short = len(html_page.run_page(run))
    steps = [event for event in events_of_a_run(10) if isinstance(event, StepDone | MemoryMeasured)]
    for path, kind, name in ((run.metrics, StepDone, "step"), (run.memory, MemoryMeasured, "memory")):
        event = next(dataclasses.asdict(each) for each in steps if isinstance(each, kind))
        dice = random.Random(0)
        lines = ({"event": name, **event, "step": i, "loss": dice.random()} for i in range(20_000))
        if kind is MemoryMeasured:
            lines = ({key: value for key, value in line.items() if key != "loss"} for line in lines)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample = {**SCORES["samples"][0], "tuned": "word " * 1_000_000}
    write_json(run.scores, {**SCORES, "samples": [sample] * 5})
    long = html_page.run_page(run)
    assert len(long) < short + 60_000
    assert "characters more" in long


def test_a_run_that_never_began_has_a_page_that_says_so(tmp_path: Path) -> None:
    run = start_run(tmp_path)
    found = Page(html_page.run_page(run))
    for sentence in run_record.read(run).missing:
        assert sentence in found.text
    assert not found.of("svg")
    assert found.open == []


@pytest.mark.parametrize(
    "gone", ["lock.json", "data.json", "plan.json", "scores.json", "metrics.jsonl", "memory.jsonl"]
)
def test_any_file_may_be_gone_or_broken(whole_run: RunDir, gone: str) -> None:
    path = whole_run.path / gone
    whole = path.read_bytes()
    path.unlink()
    assert Page(html_page.run_page(whole_run)).open == []
    for seed in range(3):
        path.write_bytes(whole[: random.Random(seed).randrange(len(whole))])
        assert Page(html_page.run_page(whole_run)).open == []


def test_the_forecast_is_drawn_on_a_card_and_not_where_the_host_is_measured(whole_run: RunDir) -> None:
    drawn = run_charts.memory(run_record.read(on_a_card(whole_run)))
    assert drawn is not None
    assert ("forecast peak", "5.0 GiB") in [(key.name, key.value) for key in drawn.keys]
    write_json(whole_run.plan, {**PLAN, "device": {"name": "cpu"}, "forecast": {"device": {"base": 1}, "host": {}}})
    whole_run.record(Rehearsed(40 << 20, 41 << 20, "loss", ()))
    on_host = run_charts.memory(run_record.read(whole_run))
    assert on_host is not None
    assert "forecast peak" not in [key.name for key in on_host.keys]
    assert "the largest batch takes 41 MiB, forecast 40 MiB (2.5 % more)" in Page(html_page.run_page(whole_run)).text


def test_exports_and_merge_are_told_with_their_verdict(whole_run: RunDir) -> None:
    write_json(whole_run.path / "export-gguf.json", {"passed": True, "quant": "q8_0", "llama_cpp": {"top1": 0.991}})
    write_json(whole_run.path / "export-ollama.json", {"passed": False})
    text = Page(html_page.run_page(whole_run)).text
    assert "Export gguf: passed" in text
    assert "Export ollama: failed" in text
    assert "llama cpp.top1 0.991" in text


def test_an_export_is_told_in_words(whole_run: RunDir) -> None:
    verdict = {
        "mean_kl": 2.7e-4,
        "agreement_fraction": 0.992,
        "near_tie_fraction": 0.008,
        "positions": 2042,
        "base_kl": None,
        "live_loss": 3.6892,
        "file_loss": 3.6882,
        "ends": 277,
        "ends_found": 277,
        "greedy": [{"same": True}, {"same": False}],
    }
    report = {
        "passed": True,
        "output": "out",
        "file": "model.gguf",
        "to": "gguf",
        "onto": "dequantised",
        "bytes": 3 << 20,
        "stored": {"Q8_0": 43, "F32": 13},
        "read_back": {"tensors": 56, "worst_fraction": 0.878},
        "texts": 54,
        "verdict": verdict,
        "notes": ["Beyond 4,096 tokens it ends."],
    }
    write_json(whole_run.export_report("mine"), report)
    text = Page(html_page.run_page(whole_run)).text
    assert "Export mine: passed" in text
    assert "out/model.gguf, 3.0 MiB: 43 Q8_0, 13 F32 tensors, folded onto the dequantised base" in text
    assert "mean KL 2.7e-04 nats, same next token 99.2 % and another as likely 0.8 % of 2,042 positions" in text
    assert "1 of 2 greedy answers the same" in text
    assert "Beyond 4,096 tokens it ends." in text


def test_samples_say_how_they_were_chosen(whole_run: RunDir) -> None:
    assert "Drawn with seed" not in html_page.run_page(whole_run)
    write_json(whole_run.scores, {**SCORES, "samples_seed": 7})
    assert "Drawn with seed 7, not picked by hand." in html_page.run_page(whole_run)


def test_a_part_has_the_dashboards_colour_and_its_own_shade() -> None:
    styles = [run_charts.part_style(name) for name in ("base", "embedding", "head", "adapter", "gradients")]
    assert len(set(styles)) == 5
    assert [style.split()[1] for style in styles] == ["cyan", "cyan", "cyan", "green", "green"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/page.html: cannot be written \(.*\). Name another --output"):
        html_page.write(tmp_path / "file" / "page.html", "text")
