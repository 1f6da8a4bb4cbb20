"""What an adapter begins from: as good as it says, on a base that stays as it is."""

import json
from pathlib import Path

import forked
import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel
from peft.tuners.lora.eva import get_eva_state_dict
from stopped_runs import assert_same, copy, qtune, told, write_recipe
from transformers import AutoModelForCausalLM

from qtune.data.packing import collate
from qtune.errors import RecipeError
from qtune.events import Scored, StepDone
from qtune.merge.live_weights import held
from qtune.model import adapter, base
from qtune.model.activation_directions import Directions, point_along_inputs
from qtune.model.checkpoint import BaseCheckpoint
from qtune.model.quantization_error import best_of_rank, make_good
from qtune.recipe import load
from qtune.recipe.schema import Lora, Model

CPU = torch.device("cpu")


def attached(folder: Path, lora: Lora, **settings: object) -> PeftModel:
    return adapter.attach(base.load_base(Model(base=str(folder), **settings), "cpu", "float32"), lora, seed=0)


def packs(count: int = 3, tokens: int = 60) -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(6, 262, (tokens,), generator=draw).tolist() for _ in range(count)]
    return [{"input_ids": row, "labels": [-100] * 9 + row[9:], "seq_lengths": [len(row)]} for row in rows]


# ---- EVA


def test_directions_of_rows_that_come_in_pieces_are_those_of_all() -> None:
    torch.manual_seed(0)
    rows = torch.randn(300, 12) @ torch.randn(12, 12) + 4
    directions = Directions(12)  # none is cut off, so nothing is lost
    for piece in rows.split(70):
        directions.add(piece)
    _, lengths, axes = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    torch.testing.assert_close(directions._lengths, lengths, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((directions.found() * axes).sum(1).abs(), torch.ones(12), rtol=1e-4, atol=1e-4)


def test_where_nothing_varies_there_is_no_direction() -> None:
    directions = Directions(4)
    directions.add(torch.ones(5, 8) * torch.tensor([1.0, 2, 3, 4, 5])[:, None])
    assert len(directions.found()) == 1
    assert len(Directions(4).found()) == 0


def seen(model: torch.nn.Module, name: str, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The inputs of a layer where a token is trained, less their mean."""
    rows: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, given: rows.append(given[0][0]))
    with torch.no_grad():
        for each in batches:
            model(**each)
    hook.remove()
    rows = [inputs[each["labels"][0] != -100] for inputs, each in zip(rows, batches, strict=True)]
    return torch.cat(rows) - torch.cat(rows).mean(0)


def test_eva_points_where_peft_points(tiny_base: Path) -> None:
    model, rows = attached(tiny_base, Lora(rank=4, init="eva"), quantization="none"), packs()
    before = model(input_ids=torch.tensor([rows[0]["input_ids"]])).logits
    with torch.no_grad():
        point_along_inputs(model, rows, lambda row: model(**collate([row])))
    torch.testing.assert_close(model(input_ids=torch.tensor([rows[0]["input_ids"]])).logits, before)

    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    config = LoraConfig(
        r=4,
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0, tau=0.0),  # as many directions everywhere; one round is enough
        target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
    )
    batches = [{name: torch.tensor([row[name]]) for name in ("input_ids", "labels")} for row in rows]
    with torch.no_grad():
        theirs = get_eva_state_dict(plain, batches, config, show_progress_bar=False)
    ours = {name: layer.lora_A["default"].weight.detach() for name, layer in adapter.adapted_layers(model)}
    assert theirs.keys() < ours.keys()
    for name, axes in theirs.items():
        torch.testing.assert_close(ours[name] @ ours[name].T, torch.eye(4), rtol=1e-4, atol=1e-4)
        inputs = seen(plain, name, batches)
        best = float(torch.linalg.svdvals(inputs)[:4].square().sum())
        reached = [float((inputs @ found.T.float()).square().sum()) / best for found in (ours[name], axes)]
        assert reached[0] > 0.97, name
        assert reached[0] > reached[1] - 0.02, name
    assert torch.equal(ours["model.layers.0.self_attn.q_proj"], ours["model.layers.0.self_attn.k_proj"])


def test_rows_too_few_for_a_rank_leave_the_rest_as_it_was(tiny_base: Path) -> None:
    model = attached(tiny_base, Lora(rank=8, targets=("q_proj",)))
    before = {name: layer.lora_A["default"].weight.clone() for name, layer in adapter.adapted_layers(model)}
    with torch.no_grad():
        point_along_inputs(model, packs(1, tokens=13), lambda row: model(**collate([row])))  # four that are trained
    for name, layer in adapter.adapted_layers(model):
        now = layer.lora_A["default"].weight
        assert not torch.equal(now[:3], before[name][:3])
        assert torch.equal(now[3:], before[name][3:])


# ---- LoftQ


def test_the_best_of_a_rank_is_as_near_as_a_whole_decomposition_says() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(96, 70)
    a, b = best_of_rank(matrix, 12)
    lengths = torch.linalg.svdvals(matrix)
    assert float((matrix - b @ a).norm()) == pytest.approx(float(lengths[12:].norm()), rel=0.01)
    a, b = best_of_rank(matrix, 80)  # more than there is
    assert (a.shape, b.shape) == ((70, 70), (96, 70))
    torch.testing.assert_close(b @ a, matrix, rtol=1e-4, atol=1e-4)


def test_where_rounding_took_nothing_a_pair_can_still_learn(tiny_base: Path) -> None:
    """A and B would both have been zero, and so would their gradients."""
    model = attached(tiny_base, Lora(rank=4, targets=("q_proj",)))
    make_good(model, lambda name, layer: (held(layer, CPU), held(layer, CPU)))
    for _, layer in adapter.adapted_layers(model):
        assert layer.lora_A["default"].weight.abs().min() > 0
        assert not layer.lora_B["default"].weight.any()


def of_files(folder: Path):
    checkpoint = BaseCheckpoint.open(folder)
    return lambda name, layer: (checkpoint.called(f"{name}.weight").float(), held(layer, CPU))


def test_loftq_makes_good_as_much_as_its_rank_can_at_any_scale(tiny_base: Path) -> None:
    """It must count the scale in, which peft's own does not, and leave the 4 bits as they are."""
    ids, weights = torch.arange(6, 60)[None], of_files(tiny_base)
    whole = base.load_base(Model(base=str(tiny_base), quantization="none"), "cpu", "float32")(
        input_ids=ids
    ).logits.detach()
    model = attached(tiny_base, Lora(rank=16, alpha=64))
    rounded = model(input_ids=ids).logits.detach()
    packed = [parameter.clone() for parameter in model.parameters() if not parameter.requires_grad]
    make_good(model, weights)
    begun = model(input_ids=ids).logits.detach()
    now = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert all(torch.equal(*pair) for pair in zip(packed, now, strict=True))
    for name, layer in adapter.adapted_layers(model):
        before, after = weights(name, layer)
        lengths = torch.linalg.svdvals(before - after)
        left = before - after - layer.get_delta_weight("default").detach()
        assert float(left.norm()) == pytest.approx(float(lengths[16:].norm()), rel=0.01), name
    assert float((begun - whole).norm()) < 0.8 * float((rounded - whole).norm())


# ---- runs


@pytest.fixture(scope="module", params=["eva", "loftq"])
def run(request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    lora = {"rank": 8, "alpha": 16, "dropout": 0, "init": request.param}
    recipe = write_recipe(folder, tiny_base, lora=lora, train={"learning_rate": 2e-2})
    assert qtune("run", recipe, "--output", folder / "run") == 0
    return folder / "run"


def test_a_run_learns_and_goes_on_to_the_bit(run: Path, tmp_path: Path) -> None:
    losses = [event.loss for event in told(run, StepDone)]
    assert losses[-1] < losses[0] - 0.05
    again = copy(run, tmp_path / "run", up_to=4)
    assert qtune("resume", again) == 0
    assert_same(run, again)


def test_it_merges_and_plain_peft_reads_the_same_on_the_base_in_4_bits(
    run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    assert qtune("merge", run, "--output", tmp_path / "merged") == 0
    assert json.loads((run / "merge.json").read_text())["onto"] == "dequantised"
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["init_lora_weights"] is True
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, BitsAndBytesConfig\n"
        "from peft import PeftModel\n"
        "bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True)\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, quantization_config=bits)\n"
        "m = PeftModel.from_pretrained(m, sys.argv[2])\n"
        "torch.save(m.train()(input_ids=torch.arange(6, 30)[None]).logits.detach(), sys.argv[3])"
    )
    forked.run(["-c", code, tiny_base, run / "adapter", tmp_path / "logits.pt"]).check_returncode()
    ours = adapter.load(base.load_base(Model(base=str(tiny_base)), "cpu", "float32"), run / "adapter")
    found = ours(input_ids=torch.arange(6, 30)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), found, atol=1e-4, rtol=1e-4)


# With the adapter on, the base's score would be that of LoftQ's beginning.
def test_the_base_is_scored_as_it_is(run: Path, finished: Path) -> None:
    def of(where: Path) -> float:
        return next(event.loss for event in told(where, Scored) if event.who == "base")

    assert of(run) == pytest.approx(of(finished), abs=1e-6)


def test_loftq_stays_with_the_base_in_4_bits(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    is_bound = "loftq" in str(run)
    assert qtune("merge", run, "--onto", "original", "--output", tmp_path / "merged") == (2 if is_bound else 0)
    if is_bound:
        assert 'lora.init = "loftq": its adapter holds part of what rounding' in capsys.readouterr().err
        assert qtune("export", run, "--to", "adapter-gguf", "--output", tmp_path / "gguf") == 2
        assert "Use --to gguf" in capsys.readouterr().err
    assert ("quantization_config=in_4_bits" in (run / "adapter" / "README.md").read_text()) == is_bound


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            'init = "pissa"',
            r"lora\.init must be one of default, eva, loftq \(PiSSA is not done, as it trains on another",
        ),
        (
            'init = "olora"',
            r"lora\.init must be one of default, eva, loftq \(OLoRA is not done, as it trains on another",
        ),
        ('init = "evo"', r"lora\.init must be default, eva or loftq, and is \"evo\"\. Did you mean eva\?"),
        ('init = ["eva"]', r"lora\.init must be default, eva or loftq, and is \[\"eva\"\]"),
        ('init = "loftq"\ndora = true', r'lora\.init = "loftq" and lora\.dora = true exclude each other: DoRA'),
        ('init = "eva"\ntargets = ["q_proj", "experts"]', r'lora\.init = "eva" and lora\.targets = .* an expert sees'),
        ('init = "loftq"\n[model]\nbase = "demo"\nquantization = "none"', r'model\.quantization = "none" exclude each'),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(settings: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    model = "" if "[model]" in settings else '[model]\nbase = "demo"\n'
    text = f'name = "t"\n[data]\ntrain = "rows.jsonl"\n{model}[lora]\n{settings}\n'
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(RecipeError, match=said):
        load.load(tmp_path / "t.toml")
