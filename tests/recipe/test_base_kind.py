"""What lies where a base should be is recognised for what it is, from names and JSON."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qtune.errors import RecipeError
from qtune.recipe import base_kind
from qtune.recipe.base_kind import causal_classes, fault_of
from qtune.recipe.load import load

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 262, "intermediate_size": 172}
CAUSAL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}
LLAVA = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "vision_config": {}}
SOURCE = "general.source.url"


def folder_with(**files: object) -> Callable[[Path], Path]:
    """A maker of a folder with these files, `__` for a dot and `___` for a slash; values are JSON or bytes."""

    def make(folder: Path) -> Path:
        for name, content in files.items():
            path = folder / name.replace("___", "/").replace("__", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return folder

    return make


def gguf(texts: dict[str, str], numbers: dict[str, int] | None = None) -> bytes:
    """The head of a GGUF file: numbers and an array of texts first, as writers may."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    pairs = [text(name) + struct.pack("<II", 4, value) for name, value in (numbers or {}).items()]
    pairs += [text("general.tags") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")]
    pairs += [text("general.counts") + struct.pack("<IIQ", 9, 4, 2) + b"\0" * 8]
    pairs += [text(name) + struct.pack("<I", 8) + text(value) for name, value in texts.items()]
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs)


FILE = gguf({"general.name": "Tiny", "general.organization": "Org", SOURCE: "https://huggingface.co/org/tiny"})
INDEX = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
KINDS = {
    "gguf": (
        folder_with(tiny__gguf=FILE, config__json=CAUSAL),
        "tiny.gguf, a GGUF file, which can be run and not tuned",
    ),
    "gguf, whose": (folder_with(tiny__gguf=FILE), "It calls itself Tiny of Org. It says that it comes from org/tiny."),
    "adapter": (
        folder_with(adapter_config__json={"base_model_name_or_path": "org/base"}),
        "is an adapter for org/base, and no model. Name the model it was trained on.",
    ),
    "run": (
        folder_with(lock__json={"base": {"name": "org/base"}}),
        "is a run of qtune on org/base, and no model. `qtune resume ",
    ),
    "run, begun": (folder_with(invocation__json={}), "is a run of qtune, and no model."),
    "empty": (folder_with(), ": it is empty. `hf download OWNER/NAME --local-dir "),
    "parent of a model": (folder_with(sub___config__json=CAUSAL), "sub does. Write base = "),
    "cache of the hub": (folder_with(snapshots___c0ffee___config__json=CAUSAL), "snapshots/c0ffee does. Write base = "),
    "mlx": (folder_with(weights__npz=b""), "holds weights for MLX"),
    "mlx, quantised": (
        folder_with(config__json={**CAUSAL, "quantization": {"bits": 4}}),
        "quantised already (for MLX)",
    ),
    "onnx": (folder_with(onnx___model__onnx=b"", tokenizer__json={}), "holds a model in ONNX"),
    "tensorflow": (folder_with(tf_model__h5=b""), "holds TensorFlow weights"),
    "meta": (folder_with(params__json={}, consolidated__pth=b""), "as Meta and Mistral publish them"),
    "pickles": (folder_with(pytorch_model__bin=b"", config__json=CAUSAL), "pytorch_model.bin is a pickle"),
    "pickles alone": (folder_with(model__pt=b""), "model.pt is a pickle"),
    "tokenizer": (folder_with(tokenizer__json={}), "holds a tokenizer (tokenizer.json) and no model"),
    "weights alone": (folder_with(model__safetensors=b""), "holds model.safetensors and no config.json."),
    "config alone": (
        folder_with(config__json=CAUSAL),
        "has neither model.safetensors nor model.safetensors.index.json.",
    ),
    "shards": (
        folder_with(**{"config__json": CAUSAL, "model__safetensors__index__json": INDEX, "model-1__safetensors": b"x"}),
        "lacks model-2.safetensors. Download the base again.",
    ),
    "git lfs": (
        folder_with(
            config__json=CAUSAL, model__safetensors=b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        ),
        "model.safetensors is a pointer of Git LFS and no weights.",
    ),
    "multimodal": (
        folder_with(config__json=LLAVA),
        "is a LlavaForConditionalGeneration, which reads more than text (vision_config), and qtune tunes causal",
    ),
    "encoder": (
        folder_with(config__json={"architectures": ["BertForMaskedLM"]}),
        "is a BertForMaskedLM, and qtune tunes",
    ),
    "nameless": (folder_with(config__json={}), "has a config.json with neither architectures nor model_type"),
    "quantised": (
        folder_with(config__json={**CAUSAL, "quantization_config": {"quant_method": "awq"}}),
        "is quantised already (awq). Name the original model",
    ),
    "quantised to 8 bits": (
        folder_with(
            config__json={**CAUSAL, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
        ),
        "is quantised already (bitsandbytes). Name the original model",
    ),
    "4 bits in another storage": (
        folder_with(
            config__json={
                **CAUSAL,
                "quantization_config": {
                    "quant_method": "bitsandbytes",
                    "load_in_4bit": True,
                    "bnb_4bit_quant_storage": "bfloat16",
                },
            }
        ),
        "stores its 4 bits as bfloat16, and only uint8 can be read. Name the original model",
    ),
    "without a size": (
        folder_with(config__json={"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1}),
        "lacks hidden_size and num_hidden_layers and intermediate_size, and a default would describe another model.",
    ),
    "no json": (folder_with(config__json=b"{"), "config.json cannot be used ("),
    "no object": (folder_with(config__json=[1]), "config.json cannot be used (it holds no JSON object)"),
    "something else": (folder_with(notes__txt=b""), "holds no model, it has no config.json."),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_tuned_is_called_what_it_is(kind: str, tmp_path: Path) -> None:
    """Most of these were met minutes later, by a library, in words about something else."""
    make, words = KINDS[kind]
    (tmp_path / "it").mkdir()
    assert words in str(fault_of(make(tmp_path / "it")))


def test_bases_are_let_through(tiny_base: Path, tmp_path: Path) -> None:
    assert fault_of(tiny_base) is None
    config = folder_with(config__json=CAUSAL)(tmp_path / "config")
    assert fault_of(config, needs_weights=False) is None
    own = folder_with(config__json={"architectures": ["OwnModel"]}, model__safetensors=b"x")(tmp_path / "own")
    assert "is a OwnModel" in str(fault_of(own))
    assert fault_of(own, trust_remote_code=True) is None


def test_an_adapter_leads_to_a_start_from_it(tmp_path: Path) -> None:
    folder_with(lock__json={}, adapter___adapter_config__json={})(tmp_path)
    for folder in (tmp_path, tmp_path / "adapter"):
        assert f'name its base there and write start_from = "{folder}" under [lora]' in str(fault_of(folder))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.gguf", "a.gguf is a GGUF file, which can be run and not tuned."),
        ("a.safetensors", "a.safetensors is one file of a model. Name the folder that it is in: "),
        ("config.json", "config.json is one file of a model."),
        ("a.bin", "a.bin is a pickle"),
        ("a.txt", "a.txt is a file, and a folder is needed."),
    ],
)
def test_a_file_is_no_base(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert words in str(fault_of(tmp_path / name))


def test_the_classes_are_those_of_transformers() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert causal_classes() == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def test_the_head_of_a_gguf_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    whole = gguf({"general.name": "é", "b": "x" * 10}, {"llama.block_count": 3})
    for content, expected in (
        (whole, {"general.name": "é", "b": "x" * 10}),
        (whole[:-1], {"general.name": "é"}),
        (gguf({"a": "x" * base_kind.GGUF_HEAD_BYTES}), {}),
        (b"GGUF", {}),
        (b"", {}),
        (b"x" * 100, {}),
        (b"GGUF" + b"\xff" * 100, {}),
    ):
        path.write_bytes(content)
        assert base_kind.gguf_texts(path) == expected
    assert base_kind.gguf_texts(tmp_path) == {}


@pytest.mark.parametrize("is_array", [False, True])
@pytest.mark.parametrize(
    ("kind", "of_struct"),
    [(0, "B"), (1, "b"), (2, "H"), (3, "h"), (4, "I"), (5, "i"), (6, "f"), (7, "?"), (10, "Q"), (11, "q"), (12, "d")],
)
def test_a_value_of_any_type_before_the_name_is_passed_over(
    kind: int, of_struct: str, is_array: bool, tmp_path: Path
) -> None:
    """A size that is off by one loses the name behind it, without a word."""
    values = [1, 0, 1] if is_array else [1]
    head = struct.pack("<IIQ", 9, kind, len(values)) if is_array else struct.pack("<I", kind)
    before = struct.pack("<Q", 1) + b"k" + head + struct.pack(f"<{len(values)}{of_struct}", *values)
    name = struct.pack("<Q", 12) + b"general.name" + struct.pack("<IQ", 8, 4) + b"Tiny"
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + before + name)
    assert base_kind.gguf_texts(path) == {"general.name": "Tiny"}


def test_a_base_is_blamed_by_line_with_the_other_mistakes(tmp_path: Path) -> None:
    folder_with(it___config__json=LLAVA)(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}")
    text = 'name = "x"\n[model]\nbase = "./it"\n[lora]\nrnak = 1\n[data]\ntrain = "rows.jsonl"\n'
    (tmp_path / "my.toml").write_text(text)
    for needs_weights in (True, False):
        with pytest.raises(RecipeError) as found:
            load(tmp_path / "my.toml", needs_weights=needs_weights)
        base, rank = found.value.faults
        assert base.startswith(f"{tmp_path}/my.toml:3: model.base: {tmp_path}/it is a LlavaForConditionalGeneration")
        assert rank.startswith(f"{tmp_path}/my.toml:5: lora.rnak")


def test_no_kind_needs_torch() -> None:
    code = "import sys; from qtune.recipe import base_kind as b; b.causal_classes(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
