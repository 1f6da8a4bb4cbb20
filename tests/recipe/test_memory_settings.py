"""The [memory] table: what it takes, what it refuses, and what excludes each other, each in one sentence."""

from pathlib import Path

import pytest

from qtune.errors import RecipeError
from qtune.recipe.load import load
from qtune.recipe.schema import Memory, Recipe

ROWS = '{"question": "q", "answer": "a"}\n'


@pytest.fixture
def recipe(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text(ROWS)

    def write(memory: str, *overrides: str, model: str = "") -> Recipe:
        path = tmp_path / "t.toml"
        path.write_text(
            f'name = "t"\n[model]\nbase = "demo"\n{model}\n[data]\ntrain = "rows.jsonl"\n[memory]\n{memory}\n'
        )
        return load(path, overrides)

    return write


def test_everything_is_left_to_the_plan(recipe) -> None:
    memory = recipe("").memory
    assert memory == Memory()
    assert {name for name, value in memory if value != "auto"} == {"rehearse"}


def test_every_setting_takes_what_it_says(recipe) -> None:
    memory = recipe(
        'budget = "6GiB"\nhost_budget = "16 GB"\nkeep_layers = 0\ncheckpoints = "host"\ntile_tokens = 512\n'
        'embedding = "host"\nhead = "nf4"\nstream_layers = 12\nhead_groups = 4\nrehearse = false'
    ).memory
    assert (memory.budget, memory.keep_layers, memory.stream_layers) == ("6GiB", 0, 12)
    assert (memory.head, memory.head_groups, memory.rehearse) == ("nf4", 4, False)
    assert recipe("", "memory.budget=7.5GiB", "memory.keep_layers=3").memory.keep_layers == 3


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('budget = "6 zib"', 'memory.budget must be "auto" or a size such as "6GiB" or "7.5 GiB", and is "6 zib".'),
        ("budget = 6", 'memory.budget must be "auto" or a size such as "6GiB" or "7.5 GiB", and is 6.'),
        (
            'host_budget = "0GiB"',
            'memory.host_budget must be "auto" or a size such as "6GiB" or "7.5 GiB", and is "0GiB".',
        ),
        ('keep_layers = "two"', 'memory.keep_layers must be "auto" or a whole number of at least 0, and is "two".'),
        ("keep_layers = true", 'memory.keep_layers must be "auto" or a whole number of at least 0, and is true.'),
        ("stream_layers = -2", 'memory.stream_layers must be "auto" or a whole number of at least 0, and is -2.'),
        ("tile_tokens = 1.5", 'memory.tile_tokens must be "auto" or a whole number of at least 0, and is 1.5.'),
        ("head_groups = 0", 'memory.head_groups must be "auto" or a whole number of at least 1, and is 0.'),
        ('checkpoints = "hos"', "Did you mean host?"),
        ('head = "8bit"', "memory.head must be auto, 16bit, host or nf4"),
        ("rehearse = 1", "Write true."),
        ("gradient_checkpointing = true", "Did you mean keep_layers?"),
        (
            "keep_layers = 2\nstream_layers = 3",
            "memory.stream_layers = 3 and memory.keep_layers = 2 exclude each other",
        ),
    ],
)
def test_what_is_refused_is_refused_in_one_sentence(recipe, line: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(line)
    (fault,) = caught.value.faults
    assert sentence in fault
    assert "t.toml:" in fault


def test_zero_excludes_nothing(recipe) -> None:
    assert recipe("keep_layers = 0\nstream_layers = 3").memory.stream_layers == 3
    assert recipe("keep_layers = 3\nstream_layers = 0").memory.keep_layers == 3


def test_a_base_that_is_not_quantised_keeps_its_head(recipe) -> None:
    with pytest.raises(RecipeError, match=r'memory\.head = "nf4" would quantise the head of a base'):
        recipe('head = "nf4"', model='quantization = "none"')


def test_every_fault_is_told_at_once(recipe) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe('budget = "x"\nhead_groups = 0\ncheckpoints = "no"')
    assert len(caught.value.faults) == 3
