"""Each fault in words: the setting, what it must be, what it is, and the nearest thing that would work."""

from typing import Any

import pytest
from pydantic import ValidationError

from qtune.recipe.error_messages import OTHER_NAMES, explain, shown, unknown
from qtune.recipe.schema import Columns, Recipe


def faults(**tables: Any) -> list[str]:
    values = {"name": "x", "model": {"base": "b"}, "data": {"train": "t"}} | tables
    with pytest.raises(ValidationError) as found:
        Recipe.model_validate(values)
    return [sentence for _, sentence in explain(found.value.errors())]


TARGETS = 'lora.targets must be "all-linear" or a list of layer names such as ["q_proj", "v_proj"],'
SIZE = 'memory.budget must be "auto" or a size such as "6GiB" or "7.5 GiB",'


@pytest.mark.parametrize(
    ("table", "values", "expected"),
    [
        ("lora", {"rank": 0}, "lora.rank must be at least 1, and is 0."),
        ("lora", {"rank": 5000}, "lora.rank must be at most 1,024, and is 5000."),
        ("lora", {"alpha": 0}, "lora.alpha must be more than 0, and is 0."),
        ("lora", {"dropout": 1.0}, "lora.dropout must be less than 1, and is 1.0."),
        ("train", {"weight_decay": 1.5}, "train.weight_decay must be at most 1, and is 1.5."),
        ("train", {"warmup_fraction": 2}, "train.warmup_fraction must be at most 0.5, and is 2."),
        ("lora", {"rank": "16"}, 'lora.rank must be a whole number, and is "16". Write 16.'),
        ("lora", {"rank": 16.0}, "lora.rank must be a whole number, and is 16.0. Write 16."),
        ("lora", {"rank": 16.5}, "lora.rank must be a whole number, and is 16.5."),
        ("lora", {"rank": True}, "lora.rank must be a whole number, and is true."),
        ("lora", {"rank": 16**999}, "lora.rank must be at most 1,024, and is an enormous number."),
        ("train", {"learning_rate": "2e-4"}, 'train.learning_rate must be a number, and is "2e-4". Write 2e-4.'),
        ("train", {"epochs": float("nan")}, "train.epochs must be a finite number, and is nan."),
        ("train", {"epochs": [1]}, "train.epochs must be a number, and is [1]."),
        ("lora", {"dora": "yes"}, 'lora.dora must be true or false, and is "yes". Write true.'),
        ("lora", {"dora": 0}, "lora.dora must be true or false, and is 0. Write false."),
        ("lora", {"dora": "perhaps"}, 'lora.dora must be true or false, and is "perhaps".'),
        ("lora", {"targets": "q_proj"}, TARGETS + ' and is "q_proj". Write ["q_proj"].'),
        ("memory", {"budget": 8}, SIZE + ' and is 8. Did you mean "8GiB"?'),
        ("model", {"base": 3}, 'model.base must be text, and is 3. Put it in quotes: "3".'),
        ("model", {"base": ""}, 'model.base must be text that is not empty, and is "".'),
        ("model", {"base": {"a": 1}}, "model.base must be text, and is a table."),
        (
            "train",
            {"schedule": "cosin"},
            'train.schedule must be cosine, linear, constant, wsd or cosine_restarts, and is "cosin". Did you mean'
            " cosine?",
        ),
        (
            "train",
            {"schedule": 3},
            "train.schedule must be cosine, linear, constant, wsd or cosine_restarts, and is 3.",
        ),
        ("model", {"quantization": "NF4"}, 'model.quantization must be nf4 or none, and is "NF4". Did you mean nf4?'),
        (
            "lora",
            {"targets": ["q_proj", 3]},
            'lora.targets must be "all-linear" or a list of layer names such as ["q_proj", "v_proj"],'
            ' and is ["q_proj", 3].',
        ),
    ],
)
def test_a_value_that_does_not_fit(table: str, values: dict[str, Any], expected: str) -> None:
    base = {"base": "b"} if table == "model" else {}
    assert faults(**{table: base | values}) == [expected]


def test_a_misspelt_optimizer_is_one_mistake_and_not_one_of_the_rate_too() -> None:
    (only,) = faults(train={"optimizer": "muno"})
    assert only.startswith("train.optimizer must be adamw_8bit,")
    assert only.endswith("Did you mean muon?")


def test_tables_and_names_that_do_not_fit() -> None:
    assert faults(lora=3) == ["lora must be a table of settings, and is 3."]
    assert faults(report="wandb") == [
        'report must be a table of settings, and is "wandb". Write [report] on a line of its own, and to = "wandb" on'
        " the next."
    ]
    assert faults(model="org/x") == [
        'model must be a table of settings, and is "org/x". Write [model] on a line of its own, and base = "org/x" on'
        " the next."
    ]
    assert faults(lora=[{}]) == ["lora must be a table of settings, and is [a table]."]
    assert faults(name="My Recipe") == [
        "name must be 1 to 64 of a-z, 0-9, - and _, with a letter or digit first, and is"
        ' "My Recipe". Did you mean my-recipe?'
    ]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("lora.alhpa", "lora.alhpa is not a setting. Did you mean alpha?"),
        ("modle", "modle is not a setting. Did you mean model?"),
        ("lora.learning_rate", "lora.learning_rate is not a setting: learning_rate belongs in [train]."),
        ("rank", "rank is not a setting: rank belongs in [lora]."),
        ("data.prompt", "data.prompt is not a setting: prompt belongs in [data.columns]."),
        ("lora.name", "lora.name is not a setting: name belongs at the top, before the first [table]."),
        ("model.name", "model.name is not a setting. Did you mean base?"),
        ("model.base_model", "model.base_model is not a setting. Did you mean base?"),
        ("model.model_name", "model.model_name is not a setting. Did you mean base?"),
        ("model.model_name_or_path", "model.model_name_or_path is not a setting. Did you mean base?"),
        ("model.pretrained_model_name_or_path", "model.pretrained_model_name_or_path is not a setting. Did you mean b"),
        ("datasets", "datasets is not a setting. Did you mean data.train?"),
        ("base_model", "base_model is not a setting. Did you mean model.base?"),
        ("train.cutoff_len", "train.cutoff_len is not a setting. Did you mean data.max_tokens?"),
        ("train.save_steps", "train.save_steps is not a setting. Did you mean save.every?"),
        ("train.output_dir", "train.output_dir is not a setting: `qtune run RECIPE --output FOLDER` says where"),
        ("lora.r", "lora.r is not a setting. Did you mean rank?"),
        ("train.max_seq_length", "train.max_seq_length is not a setting. Did you mean data.max_tokens?"),
        ("lora.learning_rte", "lora.learning_rte is not a setting. Did you mean train.learning_rate?"),
        (
            "demo.train.schedule",
            "demo.train.schedule is not a setting. [demo.train] takes epochs, learning_rate, gradient_accumulation and"
            " eval_every.",
        ),
        ("lora.rank.x", "lora.rank.x is not a setting: lora.rank is a single value."),
        ("lora.zzz zzz", 'lora."zzz zzz" is not a setting. [lora] takes rank, alpha, dropout,'),
        ("zzz", "zzz is not a setting. A recipe takes name, about, model,"),
    ],
)
def test_a_name_that_is_no_setting(key: str, expected: str) -> None:
    sentence, _ = unknown(tuple(key.split(".")))
    assert sentence.startswith(expected)


def test_what_is_missing_is_said_with_an_example() -> None:
    assert faults(model={}) == [
        'model.base is missing. Put it in [model], such as base = "Qwen/Qwen3-4B-Instruct-2507".'
    ]
    with pytest.raises(ValidationError) as found:
        Recipe.model_validate({"demo": {}})
    missing = [".".join(key) for key, _ in explain(found.value.errors())]
    assert missing == ["name", "model.base", "data.train", "demo.data.train", "demo.train.epochs"]


def test_a_misspelt_setting_is_not_missing_too() -> None:
    assert faults(model={"bsae": "b"}) == ["model.bsae is not a setting. Did you mean base?"]
    with pytest.raises(ValidationError) as found:
        Recipe.model_validate({"name": "x", "modle": {"base": "b"}, "data": {"train": "t"}})
    assert [sentence for _, sentence in explain(found.value.errors())] == [
        "modle is not a setting. Did you mean model?"
    ]


def test_every_name_of_another_library_leads_to_a_setting() -> None:
    tables = [Recipe, *(field.annotation for field in Recipe.model_fields.values())]
    known = {name for table in tables for name in getattr(table, "model_fields", {})} | set(Columns.model_fields)
    assert set(OTHER_NAMES.values()) <= known
    assert not set(OTHER_NAMES) & known - {"model", "data"}


def test_values_are_shown_on_one_line_and_short() -> None:
    assert shown("a\nb") == '"a\\nb"'
    assert len(shown("x" * 500)) == 60
    assert len(shown(["x" * 50] * 500)) == 60
