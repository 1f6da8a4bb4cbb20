"""The scripts that measure memory, on tiny models: what they count, what they leave, what they refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from transformers import Qwen3MoeConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import bench_gpu  # noqa: E402
import bench_memory  # noqa: E402
import profile_memory  # noqa: E402
from gpu_items import lab, shapes, smoke  # noqa: E402

from qtune.memory.memory_parts import standing_parts  # noqa: E402
from qtune.memory.memory_tracker import LiveBytes, storage_sizes  # noqa: E402
from qtune.memory.techniques import Techniques  # noqa: E402
from qtune.model import base  # noqa: E402
from qtune.recipe.schema import Data, Lora, Model, Recipe, Train  # noqa: E402

TOKENS = 96
RECIPE = """\
name = "t"
[model]
base = "{base}"
[lora]
rank = 8
[data]
train = "rows.jsonl"
held_out_fraction = 0
max_tokens = {tokens}
[train]
gradient_accumulation = 1
"""


@pytest.fixture
def written(tmp_path: Path, tiny_base: Path):
    """Writes a recipe with its rows; returns its file."""

    def write(base_folder: Path = tiny_base) -> Path:
        rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}, said {n} times."} for n in range(40)]
        (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        recipe = tmp_path / "t.toml"
        text = RECIPE.format(base=base_folder, tokens=TOKENS)
        recipe.write_text(text, encoding="utf-8")
        return recipe

    return write


@pytest.fixture
def config_alone(tmp_path: Path) -> Path:
    folder = tmp_path / "shape"
    folder.mkdir()
    tiny_config().save_pretrained(folder)
    described = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def stage_of(loaded: torch.nn.Module, folder: Path, techniques: Techniques) -> profile_memory.Stage:
    recipe = Recipe(name="t", model=Model(base=str(folder)), lora=Lora(rank=8), data=Data(train="none"), train=Train())
    return profile_memory.set_up(loaded, recipe, techniques, "float32", "cpu")


# ---- profile_memory


def test_a_profile_finds_what_was_forecast_and_draws_it(written, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "profile"
    code = profile_memory.main([str(written()), "--output", str(out)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    found = json.loads((out / "profile.json").read_text())
    measured, forecast = sum(found["device_bytes"].values()), sum(found["forecast"]["device"].values())
    assert measured == pytest.approx(forecast, rel=0.01)
    assert found["tokens"] <= TOKENS
    assert (out / "memory_profile.png").read_bytes().startswith(b"\x89PNG")
    timeline = (out / "timeline.txt").read_text()
    assert [phase for phase in ("forward", "loss", "backward", "step") if f"\n{phase}" in timeline] == [
        "forward",
        "loss",
        "backward",
        "step",
    ]
    assert "modeling_llama.py" in printed.out  # the line that made a tensor
    assert "forecast is off by" in printed.out


def test_a_shape_is_profiled_without_its_weights(written, config_alone, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "profile"
    recipe = str(written(config_alone))
    keys = [
        "--set",
        "train.gradient_accumulation=2",
        "--set",
        "memory.keep_layers=0",
        "--set",
        "memory.checkpoints=host",
        "--set",
        "memory.stream_layers=2",
    ]
    code = profile_memory.main([recipe, "--random-weights", *keys, "--output", str(out)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    found = json.loads((out / "profile.json").read_text())
    assert found["tokens"] == TOKENS
    assert set(found["host_bytes"]) >= {"checkpoints", "streamed layers"}
    assert sum(found["device_bytes"].values()) == pytest.approx(sum(found["forecast"]["device"].values()), rel=0.01)


def test_what_cannot_be_profiled_is_said_in_a_sentence(written, config_alone, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    full = tmp_path / "full"
    full.mkdir()
    (full / "a").write_text("b")
    tries = [
        (["nowhere.toml"], 2, "no such recipe"),
        ([str(written()), "--output", str(full)], 2, "Name another --output"),
        ([str(written()), "--set", "memory.budget=soon"], 2, "memory.budget"),
        ([str(written()), "--set", f"model.base={tmp_path / 'none'}"], 2, "model.base"),
        ([str(written()), "--set", f"model.base={config_alone}"], 2, "has neither model.safetensors"),
    ]
    for arguments, wanted, part in tries:
        code = profile_memory.main(arguments)
        told = capsys.readouterr().err
        assert (code, part in told, "Traceback" in told) == (wanted, True, False), told


@pytest.mark.parametrize("techniques", [Techniques(), Techniques(recomputed_layers=2, streamed_layers=1)])
def test_random_weights_take_what_loaded_ones_do(tiny_base, techniques) -> None:
    settings = Model(base=str(tiny_base))
    made = profile_memory.random_weights(tiny_config(), settings, "cpu", "float32", techniques)
    loaded = base.load_base(settings, "cpu", "float32")

    def sizes(model: torch.nn.Module) -> list[tuple[str, str, int]]:
        stage = stage_of(model, tiny_base, techniques)
        parts = standing_parts(stage.model, stage.engine, None)
        return [(part, side, storage_sizes(tensors)) for part, side, tensors in parts]

    assert sizes(made) == sizes(loaded)


def test_random_weights_are_the_same_each_time_and_experts_are_packed(tiny_base) -> None:
    config = Qwen3MoeConfig(
        vocab_size=262,
        hidden_size=64,
        moe_intermediate_size=64,
        intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
    )
    settings = Model(base=str(tiny_base))
    one, two = (profile_memory.random_weights(config, settings, "cpu", "float32") for _ in range(2))
    assert one.get_output_embeddings().weight is one.get_input_embeddings().weight
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not a.is_meta
    assert one.model.layers[0].mlp.experts.down_proj.quant_state.shape == (4, 64, 64)
    stage = stage_of(one, tiny_base, Techniques(recomputed_layers=2))
    loss = profile_memory.step(stage, profile_memory.batch_of(profile_memory.random_rows(1, 32, 262), "cpu"))
    assert loss == pytest.approx(torch.tensor(262.0).log().item(), abs=0.5)


def test_gradients_that_grow_are_counted_as_such(tiny_base) -> None:
    stage = stage_of(base.load_base(Model(base=str(tiny_base)), "cpu", "float32"), tiny_base, Techniques())
    counter = LiveBytes(with_timeline=True)
    batch = profile_memory.batch_of(profile_memory.random_rows(1, 32, 262), "cpu")
    profile_memory.count_step(stage, batch, accumulates=False, counter=counter)
    grown = [parts.get("gradients", 0) for phase, parts in counter.timeline if phase == "backward"]
    trained = storage_sizes(p for p in stage.model.parameters() if p.requires_grad)
    assert grown == sorted(grown)
    assert (grown[0], counter.peaks["step"].device["gradients"]) == (0, trained)
    assert "load" not in counter.peaks


def test_a_timeline_is_cut_into_its_highest_moments_and_its_phases() -> None:
    timeline = [("forward", {"base": n}) for n in (1, 5, 2)] + [
        ("backward 1", {"base": 4}),
        ("backward 0", {"base": 3}),
    ]
    assert [sum(parts.values()) for _, parts in profile_memory.slices(timeline, 2)] == [5, 4]
    assert len(profile_memory.slices(timeline, 48)) == 5
    assert profile_memory.phase_spans(timeline) == [("forward", 0, 3), ("backward", 3, 5)]
    assert profile_memory.percent_off(101, 100) == "+1.00 %"
    assert profile_memory.parts_in({"loss": 1, "base": 2, "other": 3, "head": 0}) == ["base", "loss", "other"]


# ---- bench_memory


@pytest.mark.long
def test_each_technique_is_benched_off_and_on(tiny_base, tmp_path, capsys) -> None:
    target = tmp_path / "rows.json"
    arguments = ["--base", str(tiny_base), "--tokens", "64", "--rounds", "1", "--json", str(target)]
    assert bench_memory.main(arguments) == 0
    rows = json.loads(target.read_text())["rows"]
    plain, recomputed = rows[0], rows[1]
    assert [row["name"] for row in rows[:3]] == ["no technique", "+ recompute layers", "+ attention run again"]
    assert rows[3]["name"] == "+ checkpoints in host memory"
    assert len({json.dumps(row["techniques"]) for row in rows}) == len(rows)
    assert recomputed["device_bytes"] < plain["device_bytes"]
    assert rows[3]["host"]["checkpoints"] == recomputed["device"]["checkpoints"]
    for row in rows:
        assert row["device_bytes"] == pytest.approx(row["forecast_bytes"], rel=0.02), row["name"]
        assert row["loss"] == pytest.approx(plain["loss"], abs=2e-2), row["name"]
    assert "step time" in capsys.readouterr().out


def test_the_synthetic_shapes_are_as_large_as_they_are_called() -> None:
    for name, millions in (("100m", 100), ("300m", 300)):
        shape = bench_memory.SHARED_SHAPE | bench_memory.SHAPES[name]
        width, inner, kv = shape["hidden_size"], shape["intermediate_size"], 64 * shape["num_key_value_heads"]
        layer = 2 * width * width + 2 * width * kv + 3 * width * inner
        count = shape["num_hidden_layers"] * layer + 2 * width * shape["vocab_size"]
        assert count / 1e6 == pytest.approx(millions, rel=0.05)


def test_a_bench_of_nothing_is_refused(tmp_path, capsys) -> None:
    assert bench_memory.main(["--base", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench_memory.main(["--rounds", "0"])


# ---- bench_gpu


def test_a_rehearsal_leaves_what_it_found(tmp_path, capsys) -> None:
    assert bench_gpu.main(["--rehearse", "--items", "machine,sanitizer,cost", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu_rehearsal.json").read_text())
    assert all(item["rows"] and item["ended_early"] is None for item in report["items"].values())
    assert "these figures mean nothing" in (tmp_path / "gpu_rehearsal.md").read_text()
    assert "## cost" in capsys.readouterr().out


@pytest.mark.long
def test_a_rehearsal_goes_through_every_item(tmp_path) -> None:
    assert bench_gpu.main(["--rehearse", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu_rehearsal.json").read_text())
    assert list(report["items"]) == [name for name, item in bench_gpu.ITEMS.items() if not item.is_extra]
    assert all(item["rows"] for item in report["items"].values())
    for row in report["items"]["forecast_small"]["rows"] + report["items"]["forecast_large"]["rows"]:
        assert abs(row["off_fraction"]) < 0.01, row


@pytest.mark.long
def test_a_rehearsal_goes_through_what_is_extra(tmp_path) -> None:
    names = "floor_30b,lengths_8b,per_token,context_8gib"
    assert bench_gpu.main(["--rehearse", "--items", names, "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu_rehearsal.json").read_text())
    for row in report["items"]["lengths_8b"]["rows"]:
        assert abs(row["off_fraction"]) < 0.01
    card = report["items"]["context_8gib"]["rows"][0]
    assert card["ran_longest"] == pytest.approx(card["forecast_longest"], rel=0.15)


def test_all_of_it_is_a_call_of_ten_minutes() -> None:
    usual = [item for item in bench_gpu.ITEMS.values() if not item.is_extra]
    assert sum(item.expected for item in usual) < bench_gpu.TOTAL_SECONDS < 600
    assert all(item.expected < item.seconds for item in bench_gpu.ITEMS.values())


def test_a_check_that_fails_is_a_row_and_the_others_go_on(monkeypatch, tmp_path) -> None:
    def moved(lab):
        """What is on the host stays there."""
        raise smoke.Broken("embedding is on cuda:0")

    def whole(lab):
        """All is well."""
        return "3 steps"

    monkeypatch.setattr(smoke, "CHECKS", (moved, whole))
    assert bench_gpu.main(["--rehearse", "--items", "smoke", "--output", str(tmp_path)]) == 1
    written = (tmp_path / "gpu_rehearsal.md").read_text()
    assert "| What is on the host stays there. | no | Broken: embedding is on cuda:0 |" in written
    assert "| All is well. | yes | 3 steps |" in written


def test_what_is_kept_on_the_host_is_looked_for(tiny_base) -> None:
    techniques = Techniques(recomputed_layers=2, streamed_layers=1)
    stage = stage_of(base.load_base(Model(base=str(tiny_base)), "cpu", "float32"), tiny_base, techniques)
    assert smoke.stays_on_the_host(lab.Trained(stage, None, ())) > 0
    plain = stage_of(base.load_base(Model(base=str(tiny_base)), "cpu", "float32"), tiny_base, Techniques())
    with pytest.raises(smoke.Broken, match="nothing is in host memory"):
        smoke.stays_on_the_host(lab.Trained(plain, None, ()))
    assert smoke.near(100 << 20, 90 << 20, "reserved")
    with pytest.raises(smoke.Broken, match="300 MiB reserved"):
        smoke.near(300 << 20, 100 << 20, "reserved")


def test_an_item_that_takes_too_long_costs_only_itself() -> None:
    ended = bench_gpu.Apart("machine", is_rehearsed=True).run(seconds=0.5)
    assert (ended["rows"], ended["ended_early"]) == ([], "stopped after 0 s")


@pytest.mark.long
def test_an_item_has_a_process_of_its_own(tmp_path) -> None:
    assert bench_gpu.main(["--rehearse", "--apart", "--items", "machine,sanitizer", "--output", str(tmp_path)]) == 0
    items = json.loads((tmp_path / "gpu_rehearsal.json").read_text())["items"]
    assert items["machine"]["rows"]
    assert "not watched" in items["sanitizer"]["rows"][0]["seen"]  # by torch, which can watch a card alone


def test_an_item_that_fails_keeps_its_rows(monkeypatch, tmp_path, capsys) -> None:
    def rows(lab):
        yield {"card": "c", "tokens": 1, "peak_bytes": 2 * bench_gpu.GIB}
        raise RuntimeError("no more")

    monkeypatch.setitem(bench_gpu.ITEMS, "machine", bench_gpu.Item(rows, 60, 5))
    assert bench_gpu.main(["--rehearse", "--items", "machine", "--output", str(tmp_path)]) == 1
    written = (tmp_path / "gpu_rehearsal.md").read_text()
    assert "| c | 1 | 2.000 |" in written
    assert "Ended early: RuntimeError: no more" in written


def test_without_a_card_it_says_so(capsys, tmp_path) -> None:
    if not torch.cuda.is_available():
        assert bench_gpu.main(["--output", str(tmp_path)]) == 2
        assert "--rehearse" in capsys.readouterr().err
    assert bench_gpu.main(["--rehearse", "--items", "floor,cost"]) == 2
    assert "floor_8b" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert bench_gpu.main(["--rehearse", "--items", "", "--output", str(tmp_path / "file")]) == 2


def test_the_shapes_are_the_published_ones() -> None:
    """Parameters in billions, as their makers state them."""
    real = lab.Lab(bench_gpu.find_device(), is_rehearsed=False)
    billions = {
        "smollm2_135m": 0.1345,
        "llama_1b": 1.236,
        "qwen3_4b": 4.02,
        "gemma3_4b": 3.88,
        "mistral_7b": 7.25,
        "llama_8b": 8.03,
        "qwen3_14b": 14.77,
        "qwen3_30b_a3b": 30.5,
        "llama_70b": 70.6,
    }
    assert set(billions) == set(shapes.PUBLISHED)
    with torch.device("meta"):
        for shape, wanted in billions.items():
            model = profile_memory.AutoModelForCausalLM.from_config(real.config(shape))
            assert model.num_parameters() / 1e9 == pytest.approx(wanted, rel=0.01), shape


@pytest.mark.long
def test_plans_of_a_folder_of_configs_are_a_table(tmp_path: Path) -> None:
    """A base without weights came to be refused, and with it every row."""
    tiny_config(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "tiny")
    script = ROOT / "scripts" / "bench_plan.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path, "--tokens", "64"], capture_output=True, text=True, check=True
    )
    name, *cells, seconds = done.stdout.splitlines()[-1].strip("| ").split(" | ")
    assert name == "tiny"
    assert all(cell.endswith(": nothing needed") for cell in cells), cells
    assert seconds.endswith(" s")
