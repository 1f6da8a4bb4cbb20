"""An adapter that peft made without qtune, to start from: taken over, held against recipe and base, and loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from made_bases import make_base
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from stopped_runs import RECIPE, before_step, plans_made_once, qtune, send, told, write_recipe
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qtune import ready as readiness
from qtune.errors import MachineError, ModelError
from qtune.evaluate.held_out import read_rows
from qtune.events import Notice, StepDone
from qtune.model import adapter
from qtune.model.base import load_base
from qtune.model.start_adapter import StartAdapter
from qtune.recipe import load
from qtune.recipe.schema import Lora, Model, Recipe
from qtune.report.progress_line import Doing
from qtune.rundir import RunDir, read_json

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True, scope="module")
def quick_plans():
    with plans_made_once():
        yield


def made_by_peft(base: Path, folder: Path, **settings: Any) -> Path:
    """A PEFT folder with an adapter that matters, none of whose weights is one of bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(base)
    tuned = get_peft_model(
        model,
        LoraConfig(**{"r": 5, "lora_alpha": 7, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings}),
    )
    torch.manual_seed(3)
    for name, weight in tuned.named_parameters():
        if weight.requires_grad and ".lora_" in name:
            weight.data += 0.1 * torch.randn_like(weight)
    tuned.save_pretrained(folder)
    return folder


def recipe_from(
    folder: Path, base: Path, start: Path | str, lora: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """A recipe that leaves the adapter's shape to the adapter, and all of whose rows are one step, each by itself."""
    tables: dict[str, dict[str, Any]] = {
        "model": {"base": str(base), "quantization": "none", "compute_dtype": "float32"},
        "lora": {"start_from": str(start), **(lora or {})},
        "data": {"max_rows": 5, "held_out_fraction": 0.0},
        "train": {"max_steps": 1},
        "evaluate": {"metric": "none", "general": "none", "rows": 0},
        **changes,
    }
    path = write_recipe(folder, base)
    for table in ("data", "train"):
        tables[table] = {**RECIPE[table], **tables[table]}
    lines = ['name = "t"']
    for table, values in tables.items():
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def settled(path: Path) -> Recipe:
    recipe = load.load(path)
    config = readiness.base.read_config_alone(recipe.model)
    return readiness.started(config, recipe, Doing())


def loss_in_peft(base: Path, folder: Path, recipe: Recipe) -> float:
    """The mean over all trained tokens, each row a pass of transformers and peft alone."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    total = count = 0.0
    for example in read_rows(recipe, lambda *told: None).prepared.train:
        labels = torch.tensor([example.labels])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([example.input_ids]), labels=labels).loss
        trained = int((labels[:, 1:] != -100).sum())
        total, count = total + loss.item() * trained, count + trained
    return total / count


@pytest.mark.parametrize(
    ("settings", "variants"),
    [
        ({"r": 3, "lora_alpha": 11}, {}),
        ({"target_modules": ["v_proj", "down_proj"], "use_rslora": True}, {"rslora": True}),
        ({"target_modules": "all-linear", "lora_dropout": 0.3, "use_dora": True}, {"dora": True}),
        ({"target_modules": r".*\.(q|k)_proj", "init_lora_weights": "gaussian"}, {}),
        ({"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}, {}),
    ],
)
def test_the_first_step_is_on_the_loss_that_it_has_in_peft(tiny_base, tmp_path, settings, variants) -> None:
    start = made_by_peft(tiny_base, tmp_path / "theirs", **settings)
    path = recipe_from(tmp_path, tiny_base, start)
    assert qtune("run", path, "--output", tmp_path / "run") == 0
    expected = loss_in_peft(tiny_base, start, load.load(path))
    assert told(tmp_path / "run", StepDone)[0].loss == pytest.approx(expected, abs=2e-6)
    lora, config = read_json(tmp_path / "run" / "lock.json")["recipe"]["lora"], read_json(start / "adapter_config.json")
    assert (lora["rank"], lora["alpha"]) == (config["r"], config["lora_alpha"])
    assert {name: lora[name] for name in ("dora", "rslora")} == {"dora": False, "rslora": False, **variants}
    assert lora["dropout"] == 0.0  # how it was trained is no part of what it is
    ours, theirs = load_file(tmp_path / "run" / "adapter" / WEIGHTS), load_file(start / WEIGHTS)
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: each.shape for name, each in theirs.items()}


def test_on_a_base_in_4_bits_training_begins_with_its_weights_to_the_bit(tiny_base, tmp_path) -> None:
    """The trainer casts the adapter of a quantised model to bfloat16; the one it started from was rounded with that."""
    start = made_by_peft(tiny_base, tmp_path / "theirs")
    path = recipe_from(tmp_path, tiny_base, start, model={"base": str(tiny_base)})
    seen: dict[str, torch.Tensor] = {}
    from qtune.train.trainer import MeteredTrainer

    begin = MeteredTrainer.get_batch_samples

    def look(self: MeteredTrainer, *args: Any, **kwargs: Any) -> Any:
        seen.update({name: weight.clone() for name, weight in self.model.named_parameters() if weight.requires_grad})
        return begin(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeteredTrainer, "get_batch_samples", look)
        assert qtune("run", path, "--output", tmp_path / "run") == 0
    theirs = load_file(start / WEIGHTS)
    assert {name.replace(".default", "") for name in seen} == theirs.keys()
    assert all(torch.equal(weight, theirs[name.replace(".default", "")]) for name, weight in seen.items())


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rank", 8, "lora.rank: is 8, and the adapter of lora.start_from has 5."),
        ("alpha", 8.0, "lora.alpha: is 8.0, and the adapter of lora.start_from has 7.0."),
        (
            "targets",
            ["q_proj", "v_proj"],
            'is ["q_proj", "v_proj"], and the adapter of lora.start_from has ["q_proj"].',
        ),
        ("targets", "all-linear", 'and the adapter of lora.start_from has ["q_proj"].'),
        ("dora", True, "lora.dora: is true, and the adapter of lora.start_from has false."),
        ("rslora", True, "lora.rslora: is true, and the adapter of lora.start_from has false."),
    ],
)
def test_what_the_recipe_says_otherwise_is_refused_by_key(tiny_base, tmp_path, capsys, key, value, said) -> None:
    start = made_by_peft(tiny_base, tmp_path / "theirs")
    path = recipe_from(tmp_path, tiny_base, start, {key: value})
    assert qtune("run", path, "--output", tmp_path / "run") == 2
    told_so, line = capsys.readouterr().err, path.read_text().split("\n").index(f"{key} = {json.dumps(value)}") + 1
    assert said in told_so
    assert f"t.toml:{line}: lora.{key}:" in told_so
    assert not (tmp_path / "run").exists()


def test_what_the_recipe_says_alike_is_taken(tiny_base, tmp_path) -> None:
    start = made_by_peft(tiny_base, tmp_path / "theirs", target_modules="all-linear")
    said = {"rank": 5, "alpha": 7.0, "targets": "all-linear", "dora": False}
    assert settled(recipe_from(tmp_path, tiny_base, start, said)).lora.targets == "all-linear"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bias": "lora_only"}, 'it trained biases of the base (bias = "lora_only")'),
        ({"modules_to_save": ["lm_head"]}, 'it has modules_to_save = ["lm_head"], which a run that starts'),
        ({"lora_bias": True}, "it has lora_bias = true"),
        ({"init_lora_weights": "pissa"}, 'it was begun by "pissa", which changes the base beside it'),
        ({"layers_to_transform": [1]}, "lacks base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
        ({"target_modules": ["q_proj", "lm_head"]}, "qtune trains no adapter on lm_head"),
        ({"target_modules": ["embed_tokens"]}, "is on model.embed_tokens, and no layer of this base"),
        ({"trainable_token_indices": [3]}, "it has trainable_token_indices"),
    ],
)
def test_what_qtune_would_lose_of_it_is_refused_by_name(tiny_base, tmp_path, settings, said) -> None:
    start = made_by_peft(tiny_base, tmp_path / "theirs", **settings)
    with pytest.raises(ModelError) as refused:
        settled(recipe_from(tmp_path, tiny_base, start))
    assert str(refused.value).startswith("lora.start_from: ")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, 'is an adapter of type "IA3", and qtune trains LoRA'),
        ({"r": "5"}, 'adapter_config.json cannot be taken over: lora.rank must be a whole number, and is "5".'),
        ({"r": 0}, "adapter_config.json cannot be taken over: lora.rank must be at least 1, and is 0."),
        ({"lora_alpha": None}, "adapter_config.json cannot be taken over: lora.alpha must be a number, and is None."),
        ({"a_setting_of_tomorrow": 1}, "it has a_setting_of_tomorrow = 1"),
    ],
)
def test_a_configuration_that_is_none_is_refused(tiny_base, tmp_path, change, said) -> None:
    start = made_by_peft(tiny_base, tmp_path / "theirs")
    (start / "adapter_config.json").write_text(json.dumps({**read_json(start / "adapter_config.json"), **change}))
    with pytest.raises(ModelError, match="start_from: ") as refused:
        settled(recipe_from(tmp_path, tiny_base, start))
    assert said in str(refused.value)


def test_weights_that_are_none_are_refused(tiny_base, tmp_path, capsys) -> None:
    start = made_by_peft(tiny_base, tmp_path / "theirs")
    path = recipe_from(tmp_path, tiny_base, start)
    weights = {name: weight.clone() for name, weight in load_file(start / WEIGHTS).items()}
    (start / WEIGHTS).write_bytes(b"no header")
    with pytest.raises(ModelError, match="cannot be read"):
        settled(path)
    torch.save(weights, start / "adapter_model.bin")
    (start / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="a pickle, which can run code when it is opened"):
        settled(path)
    weights[next(iter(weights))][0, 0] = float("nan")
    save_file(weights, start / WEIGHTS)
    assert qtune("run", path, "--output", tmp_path / "run") == 2
    assert "that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (start / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"holds no adapter, it has no adapter_config\.json"):
        settled(path)


@pytest.fixture(scope="module")
def other_base(tmp_path_factory, tiny_base) -> Path:
    """Of another width, and one layer deeper."""
    folder = tmp_path_factory.mktemp("other_base")
    LlamaForCausalLM(tiny_config(hidden_size=96, num_hidden_layers=3)).save_pretrained(folder)
    return folder


def test_an_adapter_of_another_base_is_refused_by_the_tensor(tiny_base, other_base, tmp_path) -> None:
    start = made_by_peft(other_base, tmp_path / "theirs")
    path = recipe_from(tmp_path, tiny_base, start)
    with pytest.raises(ModelError, match=f"was trained on {other_base}, and model"):
        settled(path)
    described = read_json(start / "adapter_config.json")
    (start / "adapter_config.json").write_text(json.dumps({**described, "base_model_name_or_path": "elsewhere"}))
    with pytest.raises(ModelError, match=r"q_proj.lora_A.weight is 5 x 96, and this base takes 5 x 64"):
        settled(path)
    weights = {name: weight[:, :64].contiguous() for name, weight in load_file(start / WEIGHTS).items()}
    save_file({name: weight[:64] for name, weight in weights.items()}, start / WEIGHTS)
    with pytest.raises(
        ModelError, match=r"it has base_model.model.model.layers.2.*, and this base has no place for that"
    ):
        settled(path)


def test_names_on_the_hub_tell_bases_apart(tiny_base, tmp_path) -> None:
    start = made_by_peft(tiny_base, tmp_path / "theirs")
    described = read_json(start / "adapter_config.json")
    (start / "adapter_config.json").write_text(json.dumps({**described, "base_model_name_or_path": "owner/one"}))
    recipe = load.load(recipe_from(tmp_path, tiny_base, start))
    on_hub = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": "owner/two"})})
    config = readiness.base.read_config_alone(recipe.model)
    with pytest.raises(ModelError, match="was trained on owner/one, and model"):
        readiness.started(config, on_hub, Doing())
    assert "trained on owner/one" in StartAdapter.of(recipe.lora).told(recipe.model)
    same = recipe.model.model_copy(update={"base": "Owner/One"})
    assert "trained on" not in StartAdapter.of(recipe.lora).told(same)
    assert readiness.started(config, recipe.model_copy(update={"model": same}), Doing()).lora.rank == 5


def test_an_adapter_on_the_hub_is_asked_of_the_hub(tiny_base, tmp_path) -> None:
    """Here is no network: the refusal names the adapter and its setting, and no base."""
    with pytest.raises(
        MachineError, match=r"lora.start_from: 'owner/name' is not on this .* start_from = \"./adapter\""
    ):
        settled(recipe_from(tmp_path, tiny_base, "owner/name"))


def test_a_run_goes_on_from_another_run_and_tells_what_it_stood_on(tiny_base, tmp_path, capsys) -> None:
    nf4 = {"model": {"base": str(tiny_base)}}
    scored = {"data": {"max_rows": 14}, "evaluate": {"metric": "token_f1", "rows": 2, "max_new_tokens": 4}}
    first = write_recipe(tmp_path, tiny_base, train={"max_steps": 2}, evaluate={"rows": 0}, data={"max_rows": 14})
    assert qtune("run", first, "--output", tmp_path / "first") == 0
    path = recipe_from(tmp_path, tiny_base, tmp_path / "first", train={"max_steps": 4}, **nf4, **scored)
    run = tmp_path / "second"
    with before_step(3, send(15)):
        assert qtune("run", path, "--output", run) == 143
    saved = load_file(tmp_path / "first" / "adapter" / WEIGHTS)
    start = {name: weight.clone() for name, weight in saved.items()}
    lock = RunDir(run).read_lock()
    assert lock.start.sha256 == StartAdapter.of(Recipe(**lock.recipe).lora).locked().sha256
    assert [each.text for each in told(run, Notice) if "starting from the adapter of" in each.text]
    assert any(not torch.equal(start[name], each) for name, each in load_file(run / "adapter" / WEIGHTS).items())

    weights = tmp_path / "first" / "adapter" / WEIGHTS
    kept = weights.read_bytes()
    save_file({name: 2 * each for name, each in start.items()}, weights)
    capsys.readouterr()
    assert qtune("resume", run) == 2
    assert "start.sha256: was" in capsys.readouterr().err
    weights.write_bytes(kept)
    assert qtune("resume", run) == 0
    assert qtune("run", path, "--output", tmp_path / "whole") == 0
    assert (run / "adapter" / WEIGHTS).read_bytes() == (tmp_path / "whole" / "adapter" / WEIGHTS).read_bytes()

    assert f"the adapter first, SHA-256 {lock.start.sha256}" in (run / "adapter" / "README.md").read_text()
    assert f"SHA-256 {lock.start.sha256}" in (run / "summary.md").read_text()
    before = read_json(run / "base_score.json")["loss"]
    assert qtune("eval", run, "--json") == 0
    scores = read_json(run / "eval-rows.json")
    assert scores["base"]["held_out_loss"] == pytest.approx(before, abs=1e-6)
    assert scores["tuned"]["held_out_loss"] == pytest.approx(read_json(run / "scores.json")["tuned"]["held_out_loss"])


def test_an_adapter_of_a_run_on_other_weights_of_the_same_shapes_is_refused(tiny_base, tmp_path) -> None:
    first = write_recipe(tmp_path, tiny_base, train={"max_steps": 1}, evaluate={"rows": 0}, data={"max_rows": 5})
    assert qtune("run", first, "--output", tmp_path / "first") == 0
    twin = tmp_path / "twin"
    torch.manual_seed(9)
    LlamaForCausalLM(tiny_config()).save_pretrained(twin)
    for file in tiny_base.glob("tokenizer*"):
        (twin / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match=f"was trained on {tiny_base}, and model"):
        settled(recipe_from(tmp_path, twin, tmp_path / "first"))


@pytest.mark.parametrize("targets", [("experts", "q_proj"), "all-linear", ("down_proj",)])
@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_moe"])
def test_the_adapter_of_a_mixture_is_taken_over_with_its_experts(tmp_path, kind: str, targets) -> None:
    """A shared expert's linears are saved as target_parameters, as peft takes their names for experts'."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    base = make_base(tmp_path / "base", kind, shared_expert_intermediate_size=48, mlp_only_layers=[1], **sizes)
    lora = Lora(rank=6, alpha=9.0, targets=targets)
    model = adapter.attach(load_base(Model(base=str(base)), "cpu", "float32"), lora, seed=4)
    torch.manual_seed(5)
    for weight in adapter.trained_parameters(model):
        weight.data = torch.randn_like(weight, dtype=torch.float32)
    adapter.save(model, tmp_path / "theirs", str(base))
    wanted = adapter.resolve_targets(load_base(Model(base=str(base)), "cpu", "float32"), lora)
    taken = settled(recipe_from(tmp_path, base, tmp_path / "theirs", model={"base": str(base)})).lora
    assert (taken.rank, taken.alpha, taken.targets) == (6, 9.0, wanted)
    fresh = adapter.attach(load_base(Model(base=str(base)), "cpu", "float32"), taken, seed=8)
    StartAdapter.of(taken).put_on(fresh)
    theirs = dict(model.named_parameters())
    assert all(torch.equal(weight, theirs[name]) for name, weight in fresh.named_parameters() if weight.requires_grad)


def test_its_folder_is_named_beside_the_recipe_and_found_before_anything_else(tiny_base, tmp_path, capsys) -> None:
    made_by_peft(tiny_base, tmp_path / "theirs")
    path = recipe_from(tmp_path, tiny_base, "theirs")
    assert load.load(path).lora.start_from == str(tmp_path / "theirs")
    line = path.read_text().split("\n").index('start_from = "theirs"') + 1
    path.write_text(path.read_text().replace('"theirs"', '"./theires"'))
    assert qtune("run", path) == 2
    said = f"t.toml:{line}: lora.start_from: there is no folder theires in {tmp_path}. Did you mean theirs?"
    assert said in capsys.readouterr().err


def test_a_plan_is_of_the_adapter_that_it_starts_from(tiny_base, tmp_path, capsys) -> None:
    made_by_peft(tiny_base, tmp_path / "theirs", r=3, lora_alpha=6, target_modules=["q_proj", "o_proj"])
    path = recipe_from(tmp_path, tiny_base, "theirs")
    assert qtune("plan", path, "--json") == 0
    choices = {choice["name"]: choice["value"] for choice in json.loads(capsys.readouterr().out)["choices"]}
    assert choices["adapter"].startswith("LoRA, rank 3, scale 2, ")


def test_a_demo_starts_from_no_adapter(tmp_path, tiny_base) -> None:
    start = made_by_peft(tiny_base, tmp_path / "theirs")
    path = recipe_from(tmp_path, tiny_base, start)
    path.write_text(path.read_text() + '[demo.data]\ntrain = "rows.jsonl"\n[demo.train]\nepochs = 1.0\n')
    assert load.load(path).lora.start_from == str(start)
    assert load.load(path, demo=True).lora.start_from is None
    assert load.load(path, [f"lora.start_from={start}"], demo=True).lora.start_from == str(start)
