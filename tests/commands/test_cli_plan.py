"""`qtune plan` as a user meets it: a config.json is enough, and what is wrong is said in a sentence."""

import json
import re
import signal
from pathlib import Path

import pytest
from conftest import byte_tokenizer, tiny_config
from made_once import unweighed
from transformers import AutoConfig

from qtune import cli, planning

ROW = '{"question": "Which class of drug is captopril?", "answer": "ACE inhibitor"}\n'
CARD = ("--device-memory", "8GiB", "--host-memory", "32GiB")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with ten rows and a base that is nothing but its config.json."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = signal.getsignal(signal.SIGTERM)
    (tmp_path / "rows.jsonl").write_text(ROW * 10)
    write_recipe()
    write_config()
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def write_recipe(memory: str = "", base: str = "./base", data: str = "rows.jsonl", extra: str = "") -> None:
    Path("t.toml").write_text(
        f'name = "t"\n[model]\nbase = "{base}"\n[data]\ntrain = "{data}"\nmax_tokens = 96\n[memory]\n{memory}\n{extra}'
    )


def write_config(config: object = None, **changes: object) -> None:
    """The config.json of a tiny Llama with `changes`; None takes a field out."""
    Path("base").mkdir(exist_ok=True)
    described = (config or tiny_config()).to_dict() | {"architectures": ["LlamaForCausalLM"], **changes}
    kept = {name: value for name, value in described.items() if value is not None or name not in changes}
    Path("base/config.json").write_text(json.dumps(kept))


def plan(capsys: pytest.CaptureFixture, *arguments: str, weighs_all: bool = False) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        if not weighs_all:
            patch.setattr(planning, "decide", unweighed)
        status = cli.main(["plan", "t.toml", *arguments])
    return status, *capsys.readouterr()


def test_the_demo_with_its_rows(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    write_recipe(base="demo", extra="[train]\nmax_steps = 2\nepochs = 9\n")
    status, out, err = plan(capsys)
    assert (status, err) == (0, "")
    assert re.search("^ *fits ", out, re.MULTILINE)
    assert "for 2 steps" in out
    assert "not read" not in out


def test_a_config_is_enough(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    status, out, err = plan(capsys, *CARD)
    assert (status, err) == (0, "")
    assert "of 8.0 GiB on a card" in out
    assert "of 26 GiB host" in out
    assert "not read: every sequence is taken to be full" in out


def test_as_json_it_is_the_whole_plan(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    status, out, err = plan(capsys, *CARD, "--json", weighs_all=True)
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert found["fits"]
    assert all(rung["saved_bytes"] is not None for rung in found["rungs"])
    assert found["budget"] == {"device_bytes": 8 * 1024**3, "host_bytes": round(0.8 * 32 * 1024**3)}
    assert found["techniques"]["recomputed_layers"] == 0
    assert sum(found["forecast"]["device"].values()) < 600 * 1024**2


def test_what_does_not_fit_is_exit_3_with_the_changes(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    write_config(num_hidden_layers=1)
    status, out, err = plan(capsys, "--device-memory", "400MiB", "--set", "lora.rank=4")
    assert status == 3
    assert "does not fit" in out
    first, *changes = err.strip().splitlines()
    assert first.startswith("It does not fit: ")
    assert first.endswith("What would fit:")
    assert changes == [next(line for line in changes if "a device with" in line)]


@pytest.mark.long
def test_the_longest_context(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    write_config(num_hidden_layers=1)
    status, out, _ = plan(capsys, "--longest", "--device-memory", "560MiB", "--json")  # 500 of context, 16 of cuBLAS
    (row,) = json.loads(out)
    assert status == 0
    assert row["device_bytes"] == 560 * 1024**2
    assert row["tokens"] > 500
    assert row["tokens"] % 64 == 0
    assert row["bound"] in ("card", "host", "both")


def test_where_not_even_the_shortest_fits_it_is_exit_3_with_the_changes(workplace: Path, capsys) -> None:
    """The answer was a row with 0 tokens, and exit 0."""
    write_config(num_hidden_layers=1)
    status, out, err = plan(capsys, "--longest", "--device-memory", "520MiB")
    first, *changes = err.strip().splitlines()
    assert status == 3
    assert "does not fit" in out
    assert "at data.max_tokens = 64 takes" in first
    assert changes == ["  a device with 534 MiB free (memory.budget)"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--device-memory", "eight"),
        ("--device-memory", "0GiB"),
        ("--host-memory", "3 zib"),
        ("--device-memory",),
    ],
)
def test_a_size_that_is_none(workplace: Path, capsys: pytest.CaptureFixture, arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as exit:
        plan(capsys, *arguments)
    assert exit.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "holds no model, it has no config.json"),
        (b"", "cannot be used"),
        (b"not json", "cannot be used"),
        (b"\xff\xfe\x00", "cannot be used"),
        (b"[1]", "cannot be used"),
        (b"{}", "neither architectures nor model_type"),
    ],
)
def test_a_config_that_is_none(workplace: Path, capsys: pytest.CaptureFixture, content: bytes, words: str) -> None:
    path = workplace / "base" / "config.json"
    path.unlink() if content is None else path.write_bytes(content)
    status, out, err = plan(capsys)
    assert (status, out) == (2, "")
    assert err.startswith("t.toml:3: model.base: ")
    assert words in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 and num_key_value_heads = 3, and the first must be a"),
        ({"hidden_size": 0}, "hidden_size = 0, which must be a whole number of at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0, which must be"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1, which must be"),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0, which must be"),
        ({"vocab_size": 0, "pad_token_id": 0}, "vocab_size = 0, which must be"),
        ({"num_attention_heads": 5}, "cannot be used"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_act": "nope"}, "no model can be built from its config.json ('nope')"),
        ({"pad_token_id": 9999}, "Padding_idx must be within num_embeddings"),
        ({"model_type": "nonsense"}, "`nonsense`"),
        ({"model_type": None}, "`model_type`"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "is a T5ForConditionalGeneration, and qtune tunes causal"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantised already (gptq)"),
    ],
)
def test_a_config_that_contradicts_itself(
    workplace: Path, capsys: pytest.CaptureFixture, changes: dict, words: str
) -> None:
    write_config(**changes)
    status, out, err = plan(capsys, *CARD)
    assert (status, out) == (2, "")
    assert err.startswith("t.toml:3: model.base: ")
    assert words in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"])
def test_a_config_that_leaves_out_a_size(workplace: Path, capsys: pytest.CaptureFixture, field: str) -> None:
    write_config(**{field: None})
    assert plan(capsys, *CARD)[0] == 2


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ('budget = "6 zib"', 'memory.budget must be "auto" or a size'),
        ("keep_layers = 1\nstream_layers = 1", "exclude each other"),
        ("head_groups = 3", "memory.head_groups = 3 does not divide the 2 key/value heads; 2 would"),
        ('stream_layers = 2\nhost_budget = "1KiB"', "memory.stream_layers = 2 would keep"),
        ('checkpoints = "host"\nkeep_layers = 0\nhost_budget = "1KiB"', 'memory.checkpoints = "host" would keep'),
    ],
)
def test_techniques_that_cannot_be(workplace: Path, capsys: pytest.CaptureFixture, memory: str, words: str) -> None:
    write_recipe(memory)
    status, out, err = plan(capsys, *CARD)
    assert (status, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1


def write_gpt2() -> None:
    """Attention of one joint projection, and norms and an MLP of other names."""
    from transformers import GPT2Config

    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=262, bos_token_id=0, eos_token_id=1)
    write_config(config, architectures=["GPT2LMHeadModel"])


def test_rungs_that_an_architecture_does_not_allow_are_off_and_said_to_be(
    workplace: Path, capsys: pytest.CaptureFixture
) -> None:
    write_gpt2()
    status, out, _ = plan(capsys, *CARD, "--json")
    notes = {rung["setting"]: rung["note"] for rung in json.loads(out)["rungs"]}
    assert status == 0
    assert notes["head_groups"] == "refused: its attention is not made of four plain projections"


def test_and_cannot_be_forced(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    """The fault was once said to be the config's."""
    write_gpt2()
    write_recipe("head_groups = 2")
    status, _, err = plan(capsys, *CARD)
    assert status == 2
    assert "memory.head_groups = 2 cannot be done: its attention is not made of four plain projections" in err


def test_layers_that_cannot_be_found_leave_the_other_rungs(
    workplace: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No architecture of transformers is so strange, so the layers are hidden."""
    from qtune.memory import engine
    from qtune.plan import parameter_count

    for module in (engine, parameter_count):
        monkeypatch.setattr(module, "find_layers", lambda model: [])
    status, out, _ = plan(capsys, *CARD, "--json")
    notes = {rung["setting"]: rung["note"] for rung in json.loads(out)["rungs"]}
    assert status == 0
    for name in ("keep_layers", "checkpoints", "tile_tokens", "stream_layers", "head_groups"):
        assert notes[name].startswith("refused: the decoder layers of LlamaForCausalLM cannot be ")
    assert not notes["embedding"].startswith("refused")


def test_dora_is_planned_too(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    """It reads the base's weights at its start, which a plan does not have."""
    status, _, err = plan(capsys, *CARD, "--set", "lora.dora=true")
    assert (status, err) == (0, "")


def test_a_tokenizer_beside_the_config_reads_the_rows(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    byte_tokenizer().save_pretrained("base")
    status, out, _ = plan(capsys, *CARD)
    assert status == 0
    assert "not read" not in out


# Falcon looks its attention up by name in a table of its own, and a KeyError of ours was all that the user saw; Bloom's
# never asks for another, and was trained without its bias. Then both were refused.
@pytest.mark.parametrize("kind", ["falcon", "bloom"])
def test_a_base_with_an_attention_of_its_own_keeps_it(workplace: Path, capsys, kind: str) -> None:
    config = AutoConfig.for_model(kind, vocab_size=262, hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
    write_config(config, architectures=["FalconForCausalLM"])
    status, _, err = plan(capsys, *CARD)
    assert (status, err) == (0, "")
    status, _, err = plan(capsys, *CARD, "--set", 'memory.checkpoints="host"')
    assert status == 2
    assert "its attention is code of its own, so its layers run once for each length" in err


# Weights that two layers have in common were streamed for one of them, resumed for neither and not found by the merge.
def test_a_base_whose_layers_share_weights_is_refused_from_its_config(workplace: Path, capsys) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "attention_hidden_size": 128, "intermediate_size": 128}
    mamba = {"mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_d_state": 16}
    layers = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1}
    config = AutoConfig.for_model("zamba2", vocab_size=262, **sizes, **mamba, **layers)
    write_config(config, architectures=["Zamba2ForCausalLM"])
    status, _, err = plan(capsys, *CARD)
    assert status == 2
    assert "model.base: in models of type zamba2 several layers have the same weights" in err


# Bamba works the kinds of its layers out from their number, and to set them was "our fault".
def test_kinds_of_layers_that_cannot_be_set_are_left_as_they_are(workplace: Path, capsys) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    mamba = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 16}
    config = AutoConfig.for_model(
        "bamba", vocab_size=262, num_hidden_layers=6, attn_layer_indices=[1, 3, 5], **sizes, **mamba
    )
    write_config(config, architectures=["BambaForCausalLM"])
    status, _, err = plan(capsys, *CARD)
    assert status == 0, err


def test_several_cards_each_with_its_plan(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    several = ("--cards", "RTX 3090+RTX 4060", "--link", "1gbe", "--host-memory", "32GiB")
    write_recipe(extra="[train]\ngradient_accumulation = 8\n")
    status, out, _ = plan(capsys, *several)
    assert status == 0
    assert re.search(r"1 +6 +fits .* on RTX 3090", out)
    assert re.search(r"1 +2 +fits .* on RTX 4060", out)
    assert "8 packs a step over 1gbe" in out
    told = json.loads(plan(capsys, *several, "--json")[1])
    seconds = [card["packs"] * card["plan"]["speed"]["pack_seconds"] for card in told["cards"]]
    assert told["step_seconds"] == pytest.approx(max(seconds) + told["sum_seconds"])
    host = {card["plan"]["budget"]["host_bytes"] for card in told["cards"]}
    assert host == {round(0.8 * 32 * 2**30)}  # a machine each, as a network joins them


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--cards", "3x8GiB"), "--cards: 3 are too many, as a step of this recipe is 2 packs"),
        (("--cards", "2x8GiB", "--longest"), "--cards has a plan for each card"),
        (("--link", "1gbe"), "--link joins several cards"),
        (("--cards", "T4+RTX 3070"), "T4 in float16 and RTX 3070 in bfloat16, and would not train one adapter"),
    ],
)
def test_cards_that_cannot_be_planned_for(
    workplace: Path, capsys: pytest.CaptureFixture, arguments: tuple[str, ...], said: str
) -> None:
    write_recipe(extra="[train]\ngradient_accumulation = 2\n")
    status, _, err = plan(capsys, *arguments)
    assert status == 2
    assert said in " ".join(err.split())
