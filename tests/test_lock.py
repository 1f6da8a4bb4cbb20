"""What a run stands on, written and read again; and what a probe's figures come to."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from qtune.lock import Lock, LockedBase, PackingProbe, Quantization

PROBE = PackingProbe(by_neighbour=0.0, by_company=0.0, by_attention=0.0, by_loss=0.0, rounding=0.01)
LOCK = Lock(
    name="my",
    base=LockedBase("org/base", "/models/base", "5a"),
    model={"base": "org/base"},
    recipe={"model": {"base": "org/base"}, "train": {"seed": 3}},
    quantized_modules=("a", "b"),
    quantization=Quantization("nf4", True),
    device="cpu",
    compute_dtype="float32",
    data_sha256="da",
    template_sha256=None,
    tokenizer_sha256="70",
    stop_token_ids=(7, 9),
    seed=3,
    versions={"qtune": "1"},
    packing_probe=PROBE,
)


@pytest.mark.parametrize(
    ("lock", "absent"),
    [
        (LOCK, {"template_sha256"}),
        (replace(LOCK, quantization=None, packing_probe=None, name=None), {"template_sha256", "packing_probe", "name"}),
    ],
)
def test_a_lock_is_read_as_it_was_written(lock: Lock, absent: set[str]) -> None:
    written = lock.as_json()
    assert Lock.from_json(written) == lock
    assert absent.isdisjoint(written)
    assert "glance_sha256" not in written["base"]
    assert "quantization" in written  # null says that the base was not quantised


@pytest.mark.parametrize("field", ["model", "recipe", "stop_token_ids", "quantized_modules", "data_sha256", "versions"])
def test_a_lock_that_no_version_wrote_is_refused(field: str) -> None:
    values = LOCK.as_json()
    with pytest.raises(LookupError):
        Lock.from_json({name: value for name, value in values.items() if name != field})
    with pytest.raises(TypeError):
        Lock.from_json({**values, field: 3})


def test_a_base_that_was_moved_is_where_it_is_now_in_all_that_names_it() -> None:
    moved = LOCK.with_base_in(Path("/new"))
    assert (moved.base.folder, moved.base_name, moved.recipe["model"]["base"]) == ("/new", "/new", "/new")
    assert moved.base.name == "org/base"
    assert moved.recipe["train"] == {"seed": 3}


@pytest.mark.parametrize(
    ("changed", "leaks", "is_another_model", "is_another_loss"),
    [
        ({}, False, False, False),
        ({"by_neighbour": 0.01, "by_company": 0.01, "by_attention": 0.01, "by_loss": 0.001}, False, False, False),
        ({"by_neighbour": 0.011}, True, False, False),
        ({"by_company": 0.011}, True, False, False),
        ({"by_attention": 0.011}, False, True, False),
        ({"by_loss": 0.0011}, False, False, True),  # a mean over tokens rounds a tenth of what logits do
        ({"by_neighbour": math.nan, "by_attention": math.nan, "by_loss": math.nan}, True, True, True),
    ],
)
def test_what_moves_by_more_than_rounding_is_another(
    changed: dict[str, float], leaks: bool, is_another_model: bool, is_another_loss: bool
) -> None:
    probe = replace(PROBE, **changed)
    assert (probe.leaks, probe.is_another_model, probe.is_another_loss) == (leaks, is_another_model, is_another_loss)
    assert replace(LOCK, packing_probe=probe).documents_apart is leaks
    assert replace(LOCK, packing_probe=probe).as_json()["packing_probe"]["leaks"] is leaks
