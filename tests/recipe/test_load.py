"""A recipe, its overrides and its demo become one frozen value, or every fault at once."""

import json
import random
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from qtune.errors import RecipeError
from qtune.recipe import shipped_recipes
from qtune.recipe.load import as_toml, bare, blamed, json_schema, load, make_recipe
from qtune.recipe.schema import Recipe

GOOD = """\
name = "medical"
about = "Short answers"

[model]
base = "Qwen/Qwen3-4B-Instruct-2507"  # a hub name

[lora]
rank = 8
targets = ["q_proj", "v_proj"]

[data]
train = "rows.jsonl"
columns = { prompt = "question", completion = "answer" }
system = \"\"\"
Be brief.
\"\"\"

[train]
epochs = 2
learning_rate = 1e-4

[evaluate]
metric = "token_f1"
rows = 50

[demo.data]
train = "small.jsonl"
held_out = "apart.jsonl"

[demo.train]
epochs = 4
learning_rate = 3e-3

[demo.evaluate]
metric = "exact_match"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("rows.jsonl", "small.jsonl", "apart.jsonl"):
        (tmp_path / name).write_text('{"question": "a", "answer": "b"}\n')
    return tmp_path


def read(folder: Path, text: str = GOOD, overrides: Sequence[str] = (), demo: bool = False) -> Recipe:
    (folder / "my.toml").write_text(text, encoding="utf-8")
    return load(folder / "my.toml", overrides, demo)


def faults(folder: Path, text: str = GOOD, overrides: Sequence[str] = (), demo: bool = False) -> list[str]:
    """Every fault, the folder left out of it."""
    with pytest.raises(RecipeError) as found:
        read(folder, text, overrides, demo)
    return [fault.replace(f"{folder}/", "") for fault in found.value.faults]


def test_a_good_recipe_is_what_it_says(folder: Path) -> None:
    recipe = read(folder)
    assert recipe.model.base == "Qwen/Qwen3-4B-Instruct-2507"
    assert recipe.lora.targets == ("q_proj", "v_proj")
    assert recipe.data.train == str(folder / "rows.jsonl")
    assert recipe.data.columns.prompt == "question"
    assert (recipe.train.epochs, recipe.train.micro_batch) == (2.0, 1)
    assert recipe.demo is not None
    assert recipe.demo.data.train == str(folder / "small.jsonl")


def test_all_faults_are_told_at_once_each_with_its_line(folder: Path) -> None:
    text = (
        'name = "Medical"\n'
        "learning_rate = 1e-4\n"
        "[model]\n"
        'bsae = "x"\n'
        'quantization = "none"\n'
        "double_quantization = true\n"
        "[lora]\n"
        "rank = 0\n"
        "alhpa = 3\n"
        "[data]\n"
        'train = "rwos.jsonl"\n'
        "columns = { promt = 'q' }\n"
        "[train]\n"
        'schedule = "cosin"\n'
    )
    assert faults(folder, text, ["train.learning_rat=1", "train.epochs=0"]) == [
        'my.toml:1: name must be 1 to 64 of a-z, 0-9, - and _, with a letter or digit first, and is "Medical".'
        " Did you mean medical?",
        "my.toml:2: learning_rate is not a setting: learning_rate belongs in [train].",
        "my.toml:4: model.bsae is not a setting. Did you mean base?",
        'my.toml:6: model.double_quantization has no effect with model.quantization = "none". Leave it out.',
        "my.toml:8: lora.rank must be at least 1, and is 0.",
        "my.toml:9: lora.alhpa is not a setting. Did you mean alpha?",
        f"my.toml:11: data.train: there is no file rwos.jsonl in {folder}. Did you mean rows.jsonl?",
        "my.toml:12: data.columns.promt is not a setting. Did you mean prompt?",
        'my.toml:14: train.schedule must be cosine, linear, constant, wsd or cosine_restarts, and is "cosin". Did you'
        " mean cosine?",
        "--set train.epochs=0: train.epochs must be more than 0, and is 0.",
        "--set train.learning_rat=1: train.learning_rat is not a setting. Did you mean learning_rate?",
    ]


def test_broken_lines_come_with_the_other_faults_and_are_not_missing(folder: Path) -> None:
    text = (
        'name = "x"\n[model]\nbase = Qwen/Qwen3-4B\nrevision = "main"\n[lora]\nrnak = 3\n[data]\ntrain = "rwos.jsonl"\n'
        'held_out\nheld_out_split = "test"\n[train]\nlearning_rate = 0,01\nepochs = 0\n'
    )
    assert faults(folder, text) == [
        'my.toml:3: text needs quotes: base = "Qwen/Qwen3-4B". The line is: base = Qwen/Qwen3-4B',
        "my.toml:6: lora.rnak is not a setting. Did you mean rank?",
        f"my.toml:8: data.train: there is no file rwos.jsonl in {folder}. Did you mean rows.jsonl?",
        "my.toml:9: a setting is written name = value, and there is no = here. The line is: held_out",
        "my.toml:12: a number has a point and no comma: learning_rate = 0.01. The line is: learning_rate = 0,01",
        "my.toml:13: train.epochs must be more than 0, and is 0.",
    ]


def test_what_is_missing_stands_first_or_at_its_table(folder: Path) -> None:
    assert faults(folder, 'name = "x"\n[data]\nformat = "text"\n') == [
        'my.toml: model.base is missing. Put it in [model], such as base = "Qwen/Qwen3-4B-Instruct-2507".',
        'my.toml:2: data.train is missing. Put it in [data], such as train = "data/train.jsonl".',
    ]


def test_what_is_found_later_is_placed_as_the_faults_are(folder: Path) -> None:
    """A target that no layer has, or a column, was named without file and line."""
    read(folder, GOOD)
    path = folder / "my.toml"

    def told(message: str, overrides: Sequence[str] = (), demo: bool = False) -> str:
        return blamed(message, path, overrides, demo).replace(f"{folder}/", "")

    assert told("lora.targets: no x.\nlora.targets: no y.\nElse.") == (
        "my.toml:9: lora.targets: no x.\nmy.toml:9: lora.targets: no y.\nElse."
    )
    assert told('rows.jsonl: data.columns.prompt = "q"') == 'my.toml:13: rows.jsonl: data.columns.prompt = "q"'
    assert told("lora.alpha = 3") == "my.toml:7: lora.alpha = 3"
    assert told("report.to: x") == "my.toml: report.to: x"
    assert told("lora.rank: x", ["lora.rank=3"]) == "--set lora.rank=3: lora.rank: x"
    assert told("data.train: x", demo=True) == "my.toml:27: data.train: x"
    assert told("data.train: x", ["data.train=a.csv"], demo=True) == "--set data.train=a.csv: data.train: x"
    for other in ("x.y: z", "rows.jsonl:3: is bad; data.columns.prompt", "", "e.g. a"):
        assert told(other) == other


class TestOverrides:
    @pytest.mark.parametrize(
        ("text", "table", "field", "value"),
        [
            ("train.epochs=3", "train", "epochs", 3.0),
            (" train . epochs = 3 ", "train", "epochs", 3.0),
            ("train.learning_rate=1e-5", "train", "learning_rate", 1e-5),
            ("model.quantization=none", "model", "quantization", "none"),
            ('model.quantization="none"', "model", "quantization", "none"),
            ("model.revision=a=b", "model", "revision", "a=b"),
            ("data.packing=false", "data", "packing", False),
            ("data.system=Be kind. # Always", "data", "system", "Be kind. # Always"),
            ("data.system=a\nb=2", "data", "system", "a\nb=2"),
            ('lora.targets=["o_proj"]', "lora", "targets", ("o_proj",)),
            ("lora.targets=all-linear", "lora", "targets", "all-linear"),
        ],
    )
    def test_a_value_is_toml_or_else_text(self, text: str, table: str, field: str, value: object, folder: Path) -> None:
        assert getattr(getattr(read(folder, overrides=[text]), table), field) == value

    def test_a_table_is_replaced_and_the_last_one_wins(self, folder: Path) -> None:
        recipe = read(folder, overrides=['data.columns={prompt="ask"}', "lora.rank=4", "lora.rank=32"])
        assert recipe.data.columns.model_dump(exclude_none=True) == {"prompt": "ask"}
        assert recipe.lora.rank == 32

    def test_a_table_that_the_file_lacks_is_made(self, folder: Path) -> None:
        text = 'name = "x"\nmodel.base = "a/b"\n'
        assert read(folder, text, ["data.train=c/d", "data.columns.text=body"]).data.columns.text == "body"

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("train.epochs", "must be KEY=VALUE"),
            ("=3", "must be KEY=VALUE"),
            ("train..epochs=3", "must be KEY=VALUE"),
            ("", "must be KEY=VALUE"),
            ("epochs=3", "epochs is not a setting: epochs belongs in [train]."),
            ("lora.rank.x=3", "lora.rank.x is not a setting: lora.rank is a single value."),
            ("trian.epochs=3", "trian is not a setting. Did you mean train?"),
            ("lora.rank=8x", 'lora.rank must be a whole number, and is "8x".'),
            ("lora=3", "lora must be a table of settings, and is 3."),
            ("lora={rnak=3}", "lora.rnak is not a setting. Did you mean rank?"),
            ("model.base=", 'model.base must be text that is not empty, and is "".'),
            ("model.revision=12", 'model.revision must be text, and is 12. Put it in quotes: "12".'),
            ("data.train=nowhere.csv", "data.train: there is no file nowhere.csv in"),
        ],
    )
    def test_a_fault_names_the_text(self, text: str, expected: str, folder: Path) -> None:
        (fault,) = faults(folder, overrides=[text])
        assert fault.startswith(f"--set {text}: {expected}")

    def test_of_two_for_one_setting_the_last_counts_and_is_blamed(self, folder: Path) -> None:
        assert read(folder, overrides=["lora.rank=4", "lora.rank=8"]).lora.rank == 8
        (fault,) = faults(folder, overrides=["lora.rank=4", "lora.rank=0"])
        assert fault.startswith("--set lora.rank=0: lora.rank must be at least 1")

    def test_paths_are_relative_to_the_current_folder(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "here").mkdir()
        (folder / "here" / "mine.jsonl").write_text("{}\n")
        monkeypatch.chdir(folder / "here")
        assert read(folder, overrides=["data.train=mine.jsonl"]).data.train == str(folder / "here" / "mine.jsonl")
        table = read(folder, overrides=['data={train="mine.jsonl"}'])
        assert table.data.train == str(folder / "here" / "mine.jsonl")

    def test_what_an_override_makes_idle_in_the_file_is_no_fault(self, folder: Path) -> None:
        text = GOOD.replace("[lora]", "double_quantization = true\nrevision = 'main'\n[lora]")
        assert read(folder, text, ["model.quantization=none", "model.base=demo"]).model.quantization == "none"
        text = GOOD.replace("[lora]", 'quantization = "none"\n[lora]')
        (fault,) = faults(folder, text, ["model.double_quantization=true"])
        assert fault.startswith("--set model.double_quantization=true: model.double_quantization has no effect")


class TestDemo:
    def test_it_replaces_what_it_names_and_nothing_else(self, folder: Path) -> None:
        plain, demo = read(folder), read(folder, demo=True)
        assert demo.model.base == "demo"
        assert (demo.data.train, demo.data.held_out) == (str(folder / "small.jsonl"), str(folder / "apart.jsonl"))
        assert demo.data.columns == type(demo.data.columns)()
        assert demo.data.max_tokens == 512
        assert (demo.train.epochs, demo.train.learning_rate) == (4.0, 3e-3)
        assert (demo.evaluate.metric, demo.evaluate.max_new_tokens) == ("exact_match", 16)
        replaced = {
            "model": {"base"},
            "data": {"train", "held_out", "format", "columns", "max_tokens"},
            "train": {"epochs", "learning_rate"},
            "evaluate": {"metric", "rows", "max_new_tokens"},
        }
        assert demo.model_dump(exclude=replaced) == plain.model_dump(exclude=replaced)
        assert demo.demo == plain.demo

    def test_what_it_leaves_unset_stays(self, folder: Path) -> None:
        text = GOOD.replace("learning_rate = 3e-3\n", "").partition("[demo.evaluate]")[0]
        text = text.replace('held_out = "apart.jsonl"\n', "").replace("[train]", "held_out = 'apart.jsonl'\n[train]")
        demo = read(folder, text, demo=True)
        assert demo.train.learning_rate == 1e-4
        assert demo.evaluate.rows == 50
        assert demo.data.held_out is None  # the recipe's held-out rows have nothing to do with the demo's

    def test_an_override_beats_it(self, folder: Path) -> None:
        overrides = ["train.epochs=1", "data.columns.prompt=q", "demo.train.learning_rate=0.01", "model.base=a/b"]
        demo = read(folder, overrides=overrides, demo=True)
        assert (demo.train.epochs, demo.train.learning_rate) == (1.0, 0.01)
        assert demo.data.columns.model_dump(exclude_none=True) == {"prompt": "q"}
        assert demo.model.base == "a/b"

    def test_only_the_files_that_a_run_uses_must_be_there(self, folder: Path) -> None:
        (folder / "rows.jsonl").unlink()
        assert read(folder, demo=True).data.train == str(folder / "small.jsonl")
        assert faults(folder) == [f"my.toml:12: data.train: there is no file rows.jsonl in {folder}."]
        (folder / "rows.jsonl").touch()
        (folder / "apart.jsonl").unlink()
        assert read(folder).data.train == str(folder / "rows.jsonl")
        assert faults(folder, demo=True) == [
            f"my.toml:28: demo.data.held_out: there is no file apart.jsonl in {folder}."
        ]

    def test_a_recipe_without_one_says_so(self, folder: Path) -> None:
        text = GOOD.partition("[demo.data]")[0]
        assert read(folder, text).demo is None
        (fault,) = faults(folder, text, demo=True)
        assert fault.startswith("my.toml: has no [demo] table")

    def test_a_fault_in_it_is_found_without_it(self, folder: Path) -> None:
        text = GOOD.replace("epochs = 4", "epochs = -4")
        assert faults(folder, text) == ["my.toml:31: demo.train.epochs must be more than 0, and is -4."]


def test_relative_names_start_at_the_recipe_wherever_one_stands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "my.toml").write_text(GOOD)
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert load(Path("../my.toml")).data.train == str(folder / "rows.jsonl")


@pytest.mark.parametrize("path", shipped_recipes.shipped(), ids=lambda path: path.stem)
@pytest.mark.parametrize("demo", [False, True])
def test_shipped_recipes_load(path: Path, demo: bool) -> None:
    recipe = load(path, demo=demo)
    assert recipe.name == path.stem
    assert (recipe.model.base == "demo") == demo


def test_the_json_schema_fits_the_shipped_recipes_and_toml() -> None:
    schema = json_schema()
    assert schema["$schema"].endswith("2020-12/schema")
    assert schema["title"]
    assert "null" not in json.dumps(schema)  # TOML has none
    rank = schema["$defs"]["Lora"]["properties"]["rank"]
    assert (rank["default"], rank["minimum"], rank["type"]) == (16, 1, "integer")
    assert schema["$defs"]["Lora"]["additionalProperties"] is False
    for path in shipped_recipes.shipped():
        assert set(tomllib.loads(path.read_text())) <= set(schema["properties"])


def mutated(rng: random.Random, text: str) -> str:
    """`text` with one to four changes of characters, lines, keys or values."""
    words = [
        "0",
        "-1",
        "1e400",
        "nan",
        "true",
        '""',
        "[]",
        "{}",
        "[[1]]",
        "2020-01-01",
        '"\\u0000"',
        "99999999999",
        "é",
    ]
    words += [
        "rank",
        "demo",
        "[lora]",
        "[[data]]",
        "[demo]",
        "[data.columns]",
        "'",
        '"',
        '"""',
        "=",
        ".",
        "#",
        "\n",
        "\r",
    ]
    for _ in range(rng.randint(1, 4)):
        lines = text.split("\n")
        line, at = rng.randrange(len(lines)), rng.randrange(len(text) + 1)
        kind = rng.randrange(7)
        if kind == 0:
            text = text[:at] + text[at + rng.randint(1, 8) :]
        elif kind == 1:
            text = text[:at] + rng.choice(words) + text[at:]
        elif kind == 2:
            text = text[:at] + chr(rng.choice([*range(128), 0xA0, 0x2028, 0x1F600])) + text[at + 1 :]
        elif kind == 3:
            text = "\n".join([*lines[:line], *lines[line + 1 :]])
        elif kind == 4:
            text = "\n".join([*lines[: line + 1], *rng.choices(lines, k=rng.randint(1, 3)), *lines[line + 1 :]])
        elif " = " in lines[line]:
            name, _, value = lines[line].partition(" = ")
            lines[line] = f"{name} = {rng.choice(words)}" if kind == 5 else f"{name[::-1]} = {value}"
            text = "\n".join(lines)
        text = text or "x"
    return text


def faults_of_mutation(folder: Path, text: str, overrides: Sequence[str] = (), demo: bool = False) -> tuple[str, ...]:
    """Of one that loads there are none; anything but a RecipeError fails the test."""
    try:
        read(folder, text, overrides, demo)
    except RecipeError as error:
        return error.faults
    return ()


def test_a_mutated_recipe_loads_or_is_a_list_of_sentences(folder: Path) -> None:
    rng = random.Random(1)
    loaded = 0
    for number in range(2000):
        text = mutated(rng, GOOD)
        found = faults_of_mutation(folder, text, demo=number % 2 == 1)
        loaded += not found
        for fault in found:
            assert fault.startswith(f"{folder}/my.toml:"), fault
            place = fault.removeprefix(f"{folder}/my.toml:").partition(":")[0]
            assert not place.isdigit() or 1 <= int(place) <= text.count("\n") + 1, fault
            assert "\n" not in fault, fault
            assert "Input should" not in fault, fault
    assert 50 < loaded < 1000


def test_a_mutated_override_is_taken_or_named(folder: Path) -> None:
    rng = random.Random(2)
    for _ in range(400):
        text = mutated(rng, rng.choice(["train.epochs=2", 'data.columns={prompt = "q"}', "model.base=org/model"]))
        found = faults_of_mutation(folder, GOOD, [text])
        assert all(fault.startswith("--set ") for fault in found), found


def test_a_demo_may_have_a_chat_template_of_its_own(folder: Path) -> None:
    (folder / "demo.jinja").write_text("{{ messages }}")
    text = GOOD.replace("[demo.data]", '[demo.model]\nchat_template = "demo.jinja"\n\n[demo.data]')
    assert read(folder, text, demo=True).model.chat_template == str(folder / "demo.jinja")
    assert read(folder, text).model.chat_template is None
    (folder / "demo.jinja").unlink()
    assert "demo.model.chat_template" in faults(folder, text, demo=True)[0]


SEVERAL = """\
name = "several"
[model]
base = "demo"
[data]
system = "Be brief."
[[data.sources]]
train = "rows.jsonl"
columns = { prompt = "question", completion = "answer" }
[[data.sources]]
train = "texts"
share = 0.1
"""


@pytest.fixture
def sources(folder: Path) -> Path:
    (folder / "texts").mkdir()
    (folder / "texts" / "a.md").write_text("Some text.")
    return folder


def test_several_sources_are_read_and_written(sources: Path) -> None:
    recipe = read(sources, SEVERAL)
    assert [part.train for part in recipe.data.parts.values()] == [str(sources / "rows.jsonl"), str(sources / "texts")]
    assert recipe.data.parts["data.sources.0"].columns.mapped == {"prompt": "question", "completion": "answer"}
    assert {part.system for part in recipe.data.parts.values()} == {"Be brief."}
    assert recipe.data.title == "rows.jsonl, texts"
    assert read(sources, as_toml(bare(recipe))) == recipe
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe
    assert list(make_recipe(**tomllib.loads(as_toml(recipe))).data.sources) == list(recipe.data.sources)


def test_settings_of_a_source_can_be_overridden(sources: Path) -> None:
    (sources / "more.jsonl").write_text("{}\n")
    recipe = read(
        sources, SEVERAL, [f"data.sources.{each}" for each in ("1.share=0.2", "1.weight=3", "0.format=alpaca")]
    )
    assert (recipe.data.sources[1].share, recipe.data.sources[1].weight) == (0.2, 3.0)
    assert recipe.data.sources[0].format == "alpaca"
    whole = read(sources, SEVERAL, [f'data.sources=[{{train = "{sources}/more.jsonl"}}]'])
    assert [source.train for source in whole.data.sources] == [str(sources / "more.jsonl")]
    assert faults(sources, SEVERAL, ["data.sources.weight=3"]) == [
        "--set data.sources.weight=3: data.sources.weight is not a setting: data.sources is a list, and"
        " data.sources.0.weight is of its first."
    ]
    third = read(sources, SEVERAL, [f"data.sources.2.train={sources}/more.jsonl", "data.sources.2.weight=3"])
    assert [source.weight for source in third.data.sources] == [1.0, 1.0, 3.0]
    (missing,) = faults(sources, SEVERAL, ["data.sources.2.weight=3"])
    assert missing.startswith("my.toml:6: data.sources.2.train is missing. Put it in [[data.sources]]")


def test_the_demo_of_several_sources_has_its_own_rows(sources: Path) -> None:
    text = SEVERAL.replace("texts", "not there") + '[demo.data]\ntrain = "small.jsonl"\n[demo.train]\nepochs = 1\n'
    recipe = read(sources, text, demo=True)
    assert (recipe.data.train, recipe.data.sources) == (str(sources / "small.jsonl"), ())


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("share = 0.1", "share = 0", "my.toml:11: data.sources.1.share must be more than 0, and is 0."),
        ("share = 0.1", "share = 1", "my.toml:11: The shares of data.sources sum to 1, which leaves nothing for those"),
        ("share = 0.1", "share = 0.1\nmax_rows = 9", "my.toml:11: data.sources.1.share and max_rows both say"),
        ("share = 0.1", 'weight = "2"', "my.toml:11: data.sources.1.weight must be a number, and is"),
        ("share = 0.1", "weight = 0", "my.toml:11: data.sources.1.weight must be more than 0, and is 0."),
        ("share = 0.1", "shares = 0.1", "my.toml:11: data.sources.1.shares is not a setting. Did you mean share?"),
        ("share = 0.1", 'path = "x"', "my.toml:11: data.sources.1.path is not a setting. Did you mean train?"),
        ("share = 0.1", "zzz = 1", "my.toml:11: data.sources.1.zzz is not a setting. [[data.sources]] takes train,"),
        ("share = 0.1", 'format = "alpac"', "my.toml:11: data.sources.1.format must be "),
        ('train = "texts"\n', "", "my.toml:9: data.sources.1.train is missing. Put it in [[data.sources]], such as"),
        ('train = "texts"', "train = texts", 'my.toml:10: text needs quotes: train = "texts". The line is'),
        ('"texts"', '"./text"', "my.toml:10: data.sources.1.train: "),
        ('"texts"', '"texts/*.txt"', 'my.toml:10: data.sources.1.train: no file is named like "'),
        ('"texts"', '"rows.jsonl"', "my.toml:10: data.sources.1.train: "),
        ('"texts"', '"*.jsonl"', "my.toml:10: data.sources.1.train: "),
        ('"texts"', '["texts"]', "my.toml:10: data.sources.1.train must be text, and is"),
        ('system = "Be brief."', 'train = "small.jsonl"', "my.toml:5: data.train is there beside data.sources"),
        ('system = "Be brief."', 'held_out = "rows.jsonl"', "my.toml:5: data.held_out: "),
    ],
)
def test_what_is_wrong_with_a_source_has_its_key_and_line(sources: Path, old: str, new: str, expected: str) -> None:
    (found,) = faults(sources, SEVERAL.replace(old, new))
    assert found.startswith(expected)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("[data]\n", "my.toml:4: data.train is missing. Put it in [data], such as train = "),
        ("", "my.toml: data.train is missing. Put it in [data], such as train = "),
        ("[data]\nsources = []\n", "my.toml:5: data.sources is empty, so there is nothing to train on."),
        (
            '[data]\nsources = "rows.jsonl"\n',
            "my.toml:5: data.sources must be tables, each begun with",
        ),
        ('[data]\nsources = ["rows.jsonl"]\n', "my.toml:5: data.sources.0 must be a table of settings, and is"),
        ('[data.sources]\ntrain = "rows.jsonl"\n', "my.toml:4: data.sources must be tables, each begun with"),
        ('[data]\ntrain = ["rows.jsonl", "small.jsonl"]\n', "my.toml:5: data.train must be text, and is"),
    ],
)
def test_what_names_no_rows_is_told(folder: Path, data: str, expected: str) -> None:
    (found,) = faults(folder, f'name = "x"\n[model]\nbase = "demo"\n{data}')
    assert found.startswith(expected)


def test_a_fault_of_a_source_that_is_found_later_has_the_line_of_it(sources: Path) -> None:
    (sources / "my.toml").write_text(SEVERAL)
    for fault, line in (("data.sources.1.train: /x: holds no rows.", 10), ("data.sources.1.columns.prompt: no", 9)):
        assert blamed(fault, sources / "my.toml", (), False) == f"{sources}/my.toml:{line}: {fault}"
