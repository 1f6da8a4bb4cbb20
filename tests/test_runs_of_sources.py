"""A run over four sources of four formats: exact where it is stopped, and each source told of by its name."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from stopped_runs import assert_same, copy, plans_made_once, qtune, told

from qtune.events import Evaluated, StepDone
from qtune.rundir import RunDir

NAMES = ["chats.jsonl", "qa.csv", "tasks.json", "notes"]
RECIPE = """\
name = "several"
[model]
base = "{base}"
[lora]
rank = 8
dropout = 0.1
targets = ["q_proj", "v_proj"]
[data]
held_out_fraction = 0.2
max_tokens = 128
[[data.sources]]
train = "chats.jsonl"
[[data.sources]]
train = "qa.csv"
columns = {{ prompt = "asked", completion = "told" }}
system = "Be brief."
weight = 3
[[data.sources]]
train = "tasks.json"
max_rows = 12
[[data.sources]]
train = "notes"
share = 0.1
[train]
epochs = 2
gradient_accumulation = 3
learning_rate = 3e-3
eval_every = 3
[save]
every = 2
keep = 9
[evaluate]
metric = "exact_match"
rows = 2
max_new_tokens = 2
general = "none"
"""


@pytest.fixture(scope="module", autouse=True)
def made_once() -> Iterator[None]:
    with plans_made_once():
        yield


@pytest.fixture(scope="module")
def several(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the recipe, with a run of it that was not stopped in `run`."""
    folder = tmp_path_factory.mktemp("several")
    chats = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes " * (i % 5 + 1)}]}
        for i in range(24)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (folder / "qa.csv").write_text("asked,told\n" + "".join(f"q{i},a{i}\n" for i in range(15)))
    tasks = [{"instruction": f"do {i}", "input": "", "output": f"done {i}"} for i in range(20)]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    (folder / "notes").mkdir()
    for i in range(10):
        (folder / "notes" / f"{i}.md").write_text(f"Note {i}. " + "General words. " * (i % 4))
    (folder / "several.toml").write_text(RECIPE.format(base=tiny_base))
    assert qtune("run", folder / "several.toml", "--output", folder / "run") == 0
    return folder


def test_stopped_at_any_checkpoint_it_is_the_same_run_to_the_bit(several: Path, tmp_path: Path) -> None:
    for step in (2, 4):
        stopped = copy(several / "run", tmp_path / f"at-{step}", up_to=step)
        assert qtune("resume", stopped) == 0
        assert_same(stopped, several / "run")
        assert json.loads((stopped / "scores.json").read_text())["tuned"]["by_source"].keys() == set(NAMES)


def test_each_source_has_its_held_out_loss_of_which_the_whole_is_the_mean(several: Path) -> None:
    """In the journal, in the scores, and in what is shown of them."""
    run = several / "run"
    losses = told(run, Evaluated)
    assert all([name for name, _ in each.by_source] == NAMES for each in losses)
    for each in losses:
        apart = [loss for _, loss in each.by_source]
        assert min(apart) < each.loss < max(apart)
    scores = json.loads((run / "scores.json").read_text())
    assert dict(losses[-1].by_source) == scores["tuned"]["by_source"]
    assert scores["base"]["by_source"].keys() == set(NAMES)
    assert RunDir(run).data.is_file()
    page = (run / "summary.md").read_text()
    assert all(f"loss on {name}" in page for name in NAMES)
    assert "each token counts 3" in page
    assert "left out for its share" in page


def test_the_report_the_scores_and_the_plan_know_of_the_sources(
    several: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = copy(several / "run", tmp_path / "run")
    assert qtune("report", run, "--html") == 0
    assert all(name in (run / "report.html").read_text() for name in NAMES)
    assert qtune("eval", run) == 0
    capsys.readouterr()
    assert qtune("plan", several / "several.toml", "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == len(told(run, StepDone))


def test_a_source_that_was_moved_may_be_said_to_be_elsewhere_and_no_more(
    several: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    stopped = copy(several / "run", tmp_path / "run", up_to=2)
    (tmp_path / "qa.csv").write_bytes((several / "qa.csv").read_bytes())
    moved = ["--set", f"data.sources.1.train={tmp_path / 'qa.csv'}"]
    assert qtune("resume", stopped, *moved) == 2
    assert "--allow-change data.sources.1.train" in capsys.readouterr().err
    assert qtune("resume", stopped, "--set", "data.sources.1.weight=2", "--allow-change", "data.sources.1.weight") == 2
    assert "data.sources.1.weight: was 3.0, is 2.0" in capsys.readouterr().err
    assert qtune("resume", stopped, *moved, "--allow-change", "data.sources.1.train") == 0
    assert_same(stopped, several / "run")


def test_the_check_names_the_file_and_line_of_each_source(
    several: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for path in several.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("One text. " * 3)
    (tmp_path / "notes" / "b.md").write_text("One text. " * 3)
    with (tmp_path / "qa.csv").open("a") as file:
        file.write("q1,a1\nempty,\n")
    with (tmp_path / "chats.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "x"}]}\n')
    with (tmp_path / "tasks.json").open("w") as file:
        json.dump([{"instruction": "q1", "output": "a1"}, {"instruction": "other", "output": "words"}], file)
    text = (tmp_path / "several.toml").read_text().replace('system = "Be brief."', "")
    (tmp_path / "several.toml").write_text(text.replace("share = 0.1", "weight = 0.5"))
    assert qtune("data", "check", tmp_path / "several.toml", "--json") == 2
    checked = json.loads(capsys.readouterr().out)
    assert [source["name"] for source in checked["sources"]] == [str(tmp_path / name) for name in NAMES]
    places = {each["code"]: [place["place"] for place in each["places"]] for each in checked["findings"]}
    told_of = {each["code"]: [place["told"] for place in each["places"]] for each in checked["findings"]}
    assert places["missing-answer"] == ["chats.jsonl:25", "qa.csv:18"]
    assert places["duplicate"] == ["qa.csv:17", "tasks.json row 1", "b.md:1"]
    assert told_of["duplicate"] == ["is qa.csv:3", "is qa.csv:3", "is a.md:1"]
    assert qtune("data", "show", tmp_path / "several.toml", "--row", "qa.csv:3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["number"] == 27
