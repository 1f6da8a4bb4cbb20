"""Resuming: only on what the run stood on before, and with every change named by field, old value and new."""

import copy as copying
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tokenizer
from safetensors.torch import load_file, save_file
from stopped_runs import STEPS, assert_same, checkpoints, copy, plans_made_once, qtune, told, write_recipe

from qtune.errors import RunFolderError
from qtune.events import Finished, Memorised, Resumed, StepDone
from qtune.lock import Lock
from qtune.recipe.schema import Demo, DemoData, DemoEvaluate, DemoTrain, Recipe
from qtune.resume import CHANGEABLE, FIXED, Change, Invocation, changes, refuse_changes
from qtune.rundir import RunDir, write_json

FULL = Recipe(
    name="t",
    model={"base": "/bases/one"},
    data={"train": "/rows.jsonl"},
    demo=Demo(
        data=DemoData(train="/demo.jsonl"), train=DemoTrain(epochs=2.0), evaluate=DemoEvaluate(metric="exact_match")
    ),
)
LOCK: dict[str, Any] = {
    "name": "t",
    "base": {"name": "/bases/one", "folder": "/bases/one", "sha256": "0" * 64},
    "model": FULL.model.model_dump(mode="json"),
    "recipe": FULL.model_dump(mode="json"),
    "quantized_modules": ["q_proj"],
    "quantization": {"type": "nf4", "double": True, "blocksize": 64, "quant_storage": "uint8"},
    "device": "cpu",
    "compute_dtype": "bfloat16",
    "data_sha256": "1" * 64,
    "template_sha256": "2" * 64,
    "tokenizer_sha256": "3" * 64,
    "stop_token_ids": [1],
    "seed": 0,
    "versions": {"torch": "2.13.0", "peft": "0.21.2"},
}


def leaves(values: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*above, name))
        else:
            yield (*above, name)


def changed(lock: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    result = copying.deepcopy(lock)
    table = result
    for name in path[:-1]:
        table = table[name]
    table[path[-1]] = value
    return result


def changes_of(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    return changes(Lock.from_json(before), Lock.from_json(now))


def dotted(path: tuple[str, ...]) -> str:
    return ".".join(path)


RECIPE_FIELDS = list(leaves(LOCK["recipe"]))
LOCK_FIELDS = [
    ("base", "sha256"),
    *(path for path in leaves(LOCK) if path[0] not in ("recipe", "model", "base", "seed", "name")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> RunDir:
    return RunDir(tmp_path_factory.mktemp("run"))


def refusal(run: RunDir, found: list[Change], *allowed: str) -> str:
    with pytest.raises(RunFolderError) as fault:
        refuse_changes(run, found, allowed)
    return str(fault.value)


def test_the_full_recipe_has_every_field_of_the_schema() -> None:
    assert len(RECIPE_FIELDS) > 60
    assert ("demo", "train", "learning_rate") in RECIPE_FIELDS


@pytest.mark.parametrize("path", RECIPE_FIELDS, ids=dotted)
def test_every_field_of_the_recipe_is_held_to_its_value(folder: RunDir, path: tuple[str, ...]) -> None:
    [found] = changes_of(LOCK, changed(LOCK, ("recipe", *path), "another"))
    assert (found.field, found.now) == (dotted(path), "another")
    assert f'  {dotted(path)}: was {shown(found.before)}, is "another"' in refusal(folder, [found])
    is_named = dotted(path) in ("data.train", "data.held_out") or any(
        dotted(path) == name or (name.endswith(".") and dotted(path).startswith(name)) for name in CHANGEABLE
    )
    assert found.may_be_allowed == (is_named and dotted(path) not in FIXED)


@pytest.mark.parametrize("path", LOCK_FIELDS, ids=dotted)
def test_every_field_of_the_lock_is_held_to_its_value(folder: RunDir, path: tuple[str, ...]) -> None:
    another = ["another"] if isinstance(LOCK.get(path[0]), list) else "another"
    [found] = changes_of(LOCK, changed(LOCK, path, another))
    assert found.field == dotted(path)
    said = refusal(folder, [found])
    assert f"  {found.field}: was {shown(found.before)}, is {shown(another)}" in said
    assert said.startswith(f"{folder.path}: is not what it was when the run began")


def shown(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value[:12]}..."' if len(value) == 64 else f'"{value}"'
    return "unset" if value is None else str(value)


def test_the_same_is_no_change(folder: RunDir) -> None:
    assert changes_of(LOCK, copying.deepcopy(LOCK)) == []
    refuse_changes(folder, [], [])


@pytest.mark.parametrize(
    ("field", "before", "now", "is_another"),
    [
        ("train.optimizer", "paged_adamw_8bit", "adamw_8bit", False),
        ("train.optimizer", "adamw_8bit", "paged_adamw_8bit", False),
        ("train.optimizer", "paged_adamw_8bit", "adamw", True),
        ("device", "cuda:0", "cuda:1", False),
        ("device", "cuda:0", "cpu", True),
    ],
)
def test_where_something_lies_is_no_change(field: str, before: str, now: str, is_another: bool) -> None:
    def lock_with(value: str) -> Lock:
        if field == "device":
            return Lock.from_json({**LOCK, "device": value})
        return Lock.from_json(
            {**LOCK, "recipe": {**LOCK["recipe"], "train": {**LOCK["recipe"]["train"], "optimizer": value}}}
        )

    assert bool(changes(lock_with(before), lock_with(now))) == is_another


def test_a_field_that_only_one_of_them_has_is_a_change() -> None:
    [gone] = changes_of(LOCK, {**LOCK, "versions": {"torch": "2.13.0"}})
    assert (gone.field, gone.before, gone.now) == ("versions.peft", "0.21.2", None)
    [come] = changes_of({**LOCK, "versions": {"torch": "2.13.0"}}, LOCK)
    assert come.sentence() == 'versions.peft: was unset, is "0.21.2" (--allow-change versions.peft)'


def test_what_may_be_allowed_says_so_and_what_may_not_does_not(folder: RunDir) -> None:
    rate, rank = Change("train.learning_rate", 2e-4, 1e-4), Change("lora.rank", 16, 8)
    assert refusal(folder, [rate]).splitlines()[1:] == [
        "  train.learning_rate: was 0.0002, is 0.0001 (--allow-change train.learning_rate)",
        "Put it back, or allow the change as it says in brackets.",
    ]
    assert refusal(folder, [rate, rank]).splitlines()[2:] == [
        "  lora.rank: was 16, is 8",
        "Put it back, or begin a new run with `qtune run`: a run cannot go on with what has no --allow-change.",
    ]
    refuse_changes(folder, [rate], ["train.learning_rate"])
    assert "lora.rank: was 16, is 8" in refusal(folder, [rate, rank], "train.learning_rate")
    assert "lora.rank: was 16, is 8" in refusal(folder, [rank], "lora.rank")


def test_canaries_are_not_offered_to_be_changed(stopped, capsys) -> None:
    """They were, and then refused all the same, as the rows were others."""
    assert qtune("resume", stopped, "--set", "evaluate.canaries=2", "--allow-change", "evaluate.canaries") == 2
    said = capsys.readouterr().err
    assert "  evaluate.canaries: was 0, is 2; canaries are rows that are trained on\n" in said
    assert "--allow-change evaluate" not in said
    assert "begin a new run with `qtune run`" in said


def test_what_is_allowed_and_has_not_changed_is_a_slip(folder: RunDir) -> None:
    rate = Change("train.learning_rate", 2e-4, 1e-4)
    assert refusal(folder, [rate], "train.learning_rat") == (
        "--allow-change train.learning_rat: that has not changed. Did you mean train.learning_rate?"
    )
    assert refusal(folder, [], "train.epochs") == "--allow-change train.epochs: that has not changed."


@pytest.fixture(autouse=True, scope="module")
def quick_plans():
    with plans_made_once():
        yield


@pytest.fixture(scope="module")
def alone(tiny_base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    recipe = write_recipe(folder, tiny_base, save={"every": 2, "keep": 100})
    assert qtune("run", recipe, "--output", folder / "run") == 0
    return folder / "run"


@pytest.fixture
def stopped(alone, tmp_path) -> Path:
    return copy(alone, tmp_path / "run", up_to=4)


def rates(run: Path) -> list[float]:
    return [step.learning_rate for step in told(run, StepDone)]


def test_a_recipe_that_was_edited_is_refused_until_that_is_allowed(alone, stopped, capsys) -> None:
    text = (stopped / "recipe.toml").read_text()
    (stopped / "recipe.toml").write_text(text.replace("learning_rate = 0.003", "learning_rate = 0.0001"))
    lock = (stopped / "lock.json").read_bytes()
    assert qtune("resume", stopped) == 2
    assert "train.learning_rate: was 0.003, is 0.0001 (--allow-change train.learning_rate)" in capsys.readouterr().err
    assert (stopped / "lock.json").read_bytes() == lock
    assert qtune("resume", stopped, "--allow-change", "train.learning_rate") == 0
    assert rates(stopped)[:4] == rates(alone)[:4]
    assert rates(stopped)[4:] == pytest.approx([rate / 30 for rate in rates(alone)[4:]])
    assert qtune("resume", stopped) == 0


def test_more_epochs_are_more_steps_and_are_remembered(alone, stopped) -> None:
    assert qtune("resume", stopped, "--set", "train.epochs=3", "--allow-change", "train.epochs") == 0
    assert told(stopped, Finished)[-1].steps == STEPS + STEPS // 2
    assert rates(stopped)[STEPS - 1] > rates(alone)[STEPS - 1]
    assert Invocation.of_run(RunDir(stopped)).overrides == ("train.epochs=3",)
    assert qtune("resume", stopped) == 0
    assert told(stopped, Resumed)[-1].step == STEPS + STEPS // 2


def test_a_finished_run_can_be_given_more_epochs(alone, tmp_path) -> None:
    run = copy(alone, tmp_path / "run")
    assert qtune("resume", run, "--set", "train.epochs=2.5", "--allow-change", "train.epochs") == 0
    assert [step.step for step in told(run, StepDone)] == list(range(1, told(run, Finished)[-1].steps + 1))
    assert told(run, Finished)[-1].steps == 10


def edit_rows(run: Path) -> None:
    rows = run.parent / "rows.jsonl"
    rows.write_text(rows.read_text().replace("it is 3", "it is 4"))


def edit_base(run: Path) -> None:
    weights = load_file(run.parent / "base" / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, run.parent / "base" / "model.safetensors", metadata={"format": "pt"})


def edit_template(run: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("\n", "\n\n")
    tokenizer.save_pretrained(run.parent / "base")


@pytest.fixture(scope="module")
def of_its_own(tiny_base, tmp_path_factory) -> Path:
    """A folder with a base, rows and a short run, to be copied and spoiled."""
    folder = tmp_path_factory.mktemp("own") / "place"
    folder.mkdir()
    shutil.copytree(tiny_base, folder / "base")
    recipe = write_recipe(folder, folder / "base", train={"max_steps": 2})
    recipe.write_text(recipe.read_text().replace(str(folder / "base"), "./base"))
    assert qtune("run", recipe, "--output", folder / "run") == 0
    return folder


@pytest.mark.parametrize(
    ("edit", "field"),
    [(edit_rows, "data_sha256"), (edit_base, "base.sha256"), (edit_template, "template_sha256")],
)
def test_other_rows_another_base_and_another_template_are_refused(of_its_own, capsys, edit, field: str) -> None:
    """What it stands on is put back afterwards, and then the run goes on."""
    kept = {path: path.read_bytes() for path in of_its_own.rglob("*") if path.is_file()}
    edit(of_its_own / "run")
    assert qtune("resume", of_its_own / "run") == 2
    assert f"  {field}: was " in capsys.readouterr().err
    for path, content in kept.items():
        path.write_bytes(content)
    assert qtune("resume", of_its_own / "run") == 0


def test_the_newest_checkpoint_is_passed_over_if_it_is_broken(alone, stopped) -> None:
    (stopped / "checkpoints" / "step-00000004" / "optimizer.safetensors").write_bytes(b"")
    assert qtune("resume", stopped) == 0
    resumed = told(stopped, Resumed)[-1]
    assert resumed.step == 3
    assert "step-00000004 is passed over: optimizer.safetensors was changed after it was written." in resumed.text
    assert_same(stopped, alone)
    assert checkpoints(stopped) == checkpoints(alone)


@pytest.mark.long
def test_a_run_with_canaries_goes_on_as_if_it_had_never_stopped(tiny_base, tmp_path, capsys) -> None:
    recipe = write_recipe(tmp_path, tiny_base, evaluate={"canaries": 2})
    assert qtune("run", recipe, "--output", tmp_path / "alone") == 0
    run = copy(tmp_path / "alone", tmp_path / "run", up_to=4)
    assert qtune("resume", run) == 0
    assert_same(run, tmp_path / "alone")
    assert len(told(run, Memorised)) == 1
    assert qtune("resume", run, "--set", "evaluate.canaries=3", "--allow-change", "evaluate.canaries") == 2
    assert "  data_sha256: was " in capsys.readouterr().err


def test_a_run_whose_checkpoints_are_all_broken_is_refused(stopped, capsys) -> None:
    for path in (stopped / "checkpoints").iterdir():
        (path / "state.json").unlink()
    before = sorted(stopped.rglob("*"))
    assert qtune("resume", stopped) == 2
    assert "no checkpoint is whole" in capsys.readouterr().err
    assert sorted(path for path in stopped.rglob("*") if path.name != ".held") == [
        p for p in before if p.name != ".held"
    ]


def test_a_second_process_changes_nothing(stopped, capsys) -> None:
    """Its --set was written to the run's lock and invocation before it was turned away."""
    kept = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    arguments = ("resume", stopped, "--set", "train.learning_rate=1e-5", "--allow-change", "train.learning_rate")
    with RunDir(stopped).held():
        assert qtune(*arguments) == 2
    assert "another qtune is at work on this run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == kept


@pytest.mark.parametrize("name", ["metrics.jsonl", "memory.jsonl"])
@pytest.mark.parametrize("is_cut", [True, False])
def test_a_journal_that_was_cut_or_removed_is_named(stopped, capsys, name: str, is_cut: bool) -> None:
    """It was filled up with NULs, which no reader took for an event."""
    path = stopped / name
    path.write_bytes(path.read_bytes()[:100]) if is_cut else path.unlink()
    assert qtune("resume", stopped) == 2
    assert f"{name}: was cut or removed after the checkpoint was written" in capsys.readouterr().err


def test_a_line_that_is_no_event_is_named_by_its_number(stopped, capsys) -> None:
    lines = (stopped / "history.jsonl").read_text().splitlines()
    (stopped / "history.jsonl").write_text("\n".join([lines[0], lines[1][:-5], *lines[2:]]) + "\n")
    assert qtune("resume", stopped) == 2
    assert "history.jsonl:2: is no event of a run; the file was changed." in capsys.readouterr().err


def test_what_a_cut_write_left_in_the_folder_is_removed(alone, stopped) -> None:
    """Half a line in history.jsonl was gone on with, so that two events stood in one line."""
    (stopped / ".adapter.abcdefgh").mkdir()
    (stopped / ".lock.json.abcdefgh").write_text("{")
    (stopped / ".mine").write_text("kept")
    with (stopped / "history.jsonl").open("a") as file:
        file.write('{"event": "check')
    assert qtune("resume", stopped) == 0
    assert [path.name for path in sorted(stopped.glob(".*"))] == [".held", ".mine"]
    assert_same(stopped, alone)


@pytest.mark.parametrize("content", ["{}", "[]", '{"recipe_folder": 1', "null", '{"recipe_folder": "/"}'])
def test_an_invocation_that_is_none_is_named(stopped, capsys, content: str) -> None:
    (stopped / "invocation.json").write_text(content)
    assert qtune("resume", stopped) == 2
    assert "invocation.json" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"recipe": {}}'])
def test_a_lock_that_is_none_is_named(stopped, capsys, content: str) -> None:
    (stopped / "lock.json").write_text(content)
    assert qtune("resume", stopped) == 2
    assert "lock.json" in capsys.readouterr().err


def test_a_folder_that_was_used_is_not_mixed_with(alone, capsys) -> None:
    recipe = alone.parent / "t.toml"
    before = sorted(alone.rglob("*"))
    assert qtune("run", recipe, "--output", alone) == 2
    assert "exists already and is not empty" in capsys.readouterr().err
    assert sorted(alone.rglob("*")) == before


def test_a_folder_that_is_none_of_a_run_is_refused(tmp_path, capsys) -> None:
    assert qtune("resume", tmp_path) == 2
    assert qtune("resume", tmp_path / "nowhere") == 2
    said = capsys.readouterr().err.splitlines()
    assert "is no run folder, it has no lock.json" in said[0]
    assert "there is no such run folder" in said[1]


def test_an_invocation_is_kept_as_it_was_given(tmp_path) -> None:
    run = RunDir(tmp_path)
    given = Invocation("/x", ("train.epochs=2",), True)
    write_json(run.invocation, asdict(given))
    assert Invocation.of_run(run) == given
