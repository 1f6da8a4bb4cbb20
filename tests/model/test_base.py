"""The base: in 4 bits, frozen, refused by name when it is not what it must be."""

import json
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from conftest import BOS, END, PAD
from huggingface_hub import constants
from safetensors import safe_open

from qtune.errors import MachineError, ModelError
from qtune.model import base
from qtune.model.adapter import attach
from qtune.model.tokenizer import load_tokenizer
from qtune.ready import get_ready
from qtune.recipe.schema import Lora, Model, Recipe


def model_at(folder: Path, **changes: object) -> Model:
    return Model(base=str(folder), **changes)


def test_linears_are_nf4_and_everything_is_frozen(tiny_base) -> None:
    loaded = base.load_base(model_at(tiny_base), "cpu", "bfloat16")
    assert len(base.quantized_modules(loaded)) == 2 * 7
    assert "lm_head" not in base.quantized_modules(loaded)
    assert not any(p.requires_grad for p in loaded.parameters())
    state = loaded.model.layers[0].mlp.up_proj.weight.quant_state
    assert state.quant_type == "nf4"
    assert state.nested


def test_a_token_that_the_base_never_saw_is_known(tiny_base) -> None:
    loaded = base.load_base(model_at(tiny_base), "cpu", "float32")
    embedding = loaded.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[[END, PAD, 7]] *= 1e-4
    assert embedding.padding_idx == PAD  # whose row torch leaves at 0 in training
    assert base.never_seen(loaded, [END, BOS, PAD, len(embedding.weight)]) == [END]
    embedding.to("meta")  # as where other ranks hold it
    assert base.never_seen(loaded, [END]) == []


def test_files_that_were_quantised_are_let_go(tiny_base, tmp_path) -> None:
    """Embedding, head and norms stay as they were; for their sake the whole file was held."""
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    loaded = base.load_base(model_at(folder), "cpu", "float32")
    assert str(folder) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    with safe_open(folder / "model.safetensors", "pt") as stored:
        name = "model.embed_tokens.weight"
        assert torch.equal(loaded.get_input_embeddings().weight, stored.get_tensor(name))


def test_without_quantization_nothing_is_packed(tiny_base) -> None:
    loaded = base.load_base(model_at(tiny_base, quantization="none"), "cpu", "float32")
    assert base.quantized_modules(loaded) == ()


def test_gradients_after_an_evaluation_are_those_without_one(tiny_base) -> None:
    """bitsandbytes rewrote NF4 weights for an inference kernel in the first evaluation, and that kernel had no
    backward: on processors with AVX-512 BF16, whatever was trained after a score learned from half a gradient."""

    def gradients(evaluate_first: bool) -> list[torch.Tensor]:
        model = attach(base.load_base(model_at(tiny_base), "cpu", "float32"), Lora(rank=4), seed=0)
        ids = torch.arange(6, 40)[None]
        if evaluate_first:
            with torch.no_grad():
                model.eval()(input_ids=ids)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for with_evaluation, without in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(with_evaluation, without)


def test_the_demo_base_is_there_and_speaks(tiny_base) -> None:
    demo = Model(base="demo")
    config = base.read_config(demo)
    assert config.model_type == "llama"
    tokenizer = load_tokenizer(demo)
    text = "Stents, 12 mg/l of naïve ☃ and\n tabs\t."
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    size = sum(path.stat().st_size for path in base.base_folder(demo).iterdir())
    assert size <= 8_000_000


def test_a_missing_folder_is_named(tmp_path) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        base.read_config(model_at(tmp_path / "nothing"))


def test_a_folder_without_a_model_is_named(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        base.read_config(model_at(tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "is a BertForMaskedLM"),
        ({"model_type": "no_such_architecture"}, "cannot be used"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised already"),
    ],
)
def test_a_base_that_cannot_be_tuned_is_refused(tiny_base, tmp_path, change, words) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=words):
        base.read_config(model_at(folder))


def test_broken_config_json_is_one_sentence(tiny_base, tmp_path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    (folder / "config.json").write_text("{ not json")
    with pytest.raises(ModelError, match="cannot be used"):
        base.read_config(model_at(folder))


def test_weights_that_can_run_code_are_refused(tiny_base, tmp_path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        base.read_config(model_at(folder))


def test_a_hub_name_without_a_network_says_how_to_use_a_folder(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MachineError, match="cannot be reached"):
        base.read_config(Model(base="some/model-that-is-not-here"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, list[str]]]:
    """A hub on this machine: the folder that it serves, `owner/name/file`, and the paths it was asked for."""
    asked: list[str] = []
    served = tmp_path / "served"

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            path = served / self.path.strip("/").replace("resolve/main/", "")
            self.send_response(200 if path.is_file() else 404)
            for header, value in (
                ("X-Repo-Commit", "0" * 40),
                ("ETag", '"tag"'),
                ("Content-Length", str(path.stat().st_size if path.is_file() else 0)),
                *([] if path.is_file() else [("X-Error-Code", "EntryNotFound")]),
            ):
                self.send_header(header, value)
            self.end_headers()
            if self.command == "GET" and path.is_file():
                self.wfile.write(path.read_bytes())

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    place = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", place)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, place)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    Thread(target=server.serve_forever, daemon=True).start()
    yield served, asked
    server.shutdown()


def test_a_hub_model_is_judged_by_its_config_before_anything_else_is_fetched(hub, tmp_path: Path) -> None:
    """`run` and `check` fetched the weights, many GB, and then refused what they are of."""
    served, asked = hub
    for name, config in (
        ("vl", '{"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}'),
        ("gguf", ""),
    ):
        (served / "owner" / name).mkdir(parents=True)
        if config:
            (served / "owner" / name / "config.json").write_text(config)
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 9)
    for name, words in (("vl", "is a LlavaForConditionalGeneration"), ("gguf", "on the hub has no config.json")):
        data = {"train": str(tmp_path / "rows.jsonl")}
        with pytest.raises(ModelError, match=words):
            get_ready(Recipe.model_validate({"name": "t", "model": {"base": f"owner/{name}"}, "data": data}))
    assert {path for path in asked if path.startswith("/owner/")} == {
        "/owner/vl/resolve/main/config.json",
        "/owner/gguf/resolve/main/config.json",
    }


def test_what_fails_before_any_step_refuses_the_model_by_its_type() -> None:
    with (
        pytest.raises(
            ModelError, match=r"models of type blt cannot be trained here: loading one fails \(KeyError: 'x'\)"
        ),
        base.refusing_unfit("blt", "loading one"),
    ):
        raise KeyError("x")


@pytest.mark.parametrize("fault", [ModelError("its own sentence."), torch.OutOfMemoryError("none left")])
def test_refusals_and_memory_that_runs_out_are_no_reason_against_a_model(fault: Exception) -> None:
    with pytest.raises(type(fault), match=str(fault)), base.refusing_unfit("blt", "loading one"):
        raise fault
