"""What lies where a recipe's base should be: told from names and JSON, before anything heavy is imported or read.

Nothing here loads torch or transformers, so that what cannot be tuned is refused with the recipe's other mistakes.
"""

import json
import re
import shlex
import struct
from collections.abc import Collection, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from qtune.errors import ModelError
from qtune.recipe.text_part import CONFIG, INDEX_NAME, causal_classes, files_without_text, json_in, text_config_of

GGUF_SUFFIX = ".gguf"
GGUF_HEAD_BYTES = 1 << 16  # the general.* keys come first; behind them is the vocabulary, which is megabytes
GGUF_MAGIC, GGUF_STRING, GGUF_ARRAY = b"GGUF", 8, 9
GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
SINGLE_NAME, ADAPTER_CONFIG = "model.safetensors", "adapter_config.json"
LOCK, INVOCATION = "lock.json", "invocation.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
OTHER_FORMS = {  # weights that neither transformers nor qtune reads, by the files they are in
    "*.npz": "weights for MLX",
    "*.onnx": "a model in ONNX",
    "onnx/*.onnx": "a model in ONNX",
    "tf_model.h5": "TensorFlow weights",
    "*.msgpack": "Flax weights",
    "model_index.json": "a pipeline that makes images",
    "params.json": "weights as Meta and Mistral publish them beside those for transformers",
    "consolidated*": "weights as Meta and Mistral publish them beside those for transformers",
}
SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")
ON_THE_HOST = "from numbers that they wait for, so that their memory cannot be forecast"
NOT_YET = {  # what scripts/conformance.py found wrong in a run of them, or what stops one
    "blt": "it is four models in one, and what they hold together cannot be forecast",
    "dbrx": f"its layers choose experts {ON_THE_HOST}",
    "inkling2_text": "its loss is not the one that transformers gives",
    "laguna": "peft reads its shared experts under other names, so that the adapter would be another one there",
    "longcat_flash": f"its layers choose experts {ON_THE_HOST}",
    "modernbert-decoder": "its output head has layers of its own, which the loss of training does not run",
    "qwen4_exp_text": f"its layers choose what each token attends to {ON_THE_HOST}",
    "xlstm": "transformers cannot continue a text with it, which a merge is verified by",
}
SAYS_ALL_SIZES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "phi3", "phimoe", "granite", "olmo2")
HUB_PAGE = re.compile(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)/?")
LFS_POINTER = b"version https://git-lfs"
LEAST_WEIGHTS = 1024  # bytes; a Git LFS pointer has about 130, and a header of safetensors alone is longer
SENSES = ("vision_config", "audio_config", "vision_tower", "speech_config", "image_token_id", "image_token_index")
FROM_CODES = ("fp8", "mxfp4")  # how weights are quantised that are brought to 16 bits while they are read
UNQUANTISED = "Name the original model; qtune quantises it while loading."
TUNABLE = "causal language models such as LlamaForCausalLM, Qwen3ForCausalLM or MistralForCausalLM"


def fault_of(path: Path, needs_weights: bool = True, trust_remote_code: bool = False) -> str | None:
    """Why what lies at `path` cannot be tuned, and what would work; None for a base, as far as names and JSON tell.

    Without `needs_weights` a folder with nothing but a config.json is enough.
    """
    try:
        if not path.is_dir():
            return _file(path)
        for judge in (_run, _adapter, _gguf):
            if fault := judge(path):
                return fault
        if not (path / CONFIG).is_file():
            return _without_config(path)
        return _config(path, trust_remote_code) or _weights(path, needs_weights)
    except OSError as fault:
        return f"{path} cannot be read ({fault.strerror})."


def _file(path: Path) -> str:
    if path.suffix.lower() == GGUF_SUFFIX:
        return _says_gguf(path, f"{path} is a GGUF file")
    if path.suffix.lower() in (".safetensors", ".json"):
        return f"{path} is one file of a model. Name the folder that it is in: {path.parent}."
    if any(path.match(pattern) for pattern in PICKLES):
        return f"{path} is a file, and a folder is needed.{_pickled(path.name)}"
    return f"{path} is a file, and a folder is needed."


def _run(folder: Path) -> str | None:
    if not ((folder / LOCK).is_file() or (folder / INVOCATION).is_file()):
        return None
    base = json_in(folder / LOCK).get("base")
    on = f" on {base['name']}" if isinstance(base, dict) and "name" in base else ""
    return (
        f"{folder} is a run of qtune{on}, and no model. `qtune resume {shlex.quote(str(folder))}` goes on with it."
        f" {_on_top(folder)}"
    )


def _on_top(adapter: Path) -> str:
    name = json.dumps(str(adapter), ensure_ascii=False)
    return f"To train on top of it, name its base there and write start_from = {name} under [lora]."


def _adapter(folder: Path) -> str | None:
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    base = json_in(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    what = f"{folder} is an adapter{f' for {base}' if isinstance(base, str) and base else ''}, and no model"
    return f"{what}. Name the model it was trained on. {_on_top(folder)}"


def _gguf(folder: Path) -> str | None:
    files = _named(folder, "*.gguf")
    if not files or _named(folder, "*.safetensors"):
        return None
    return _says_gguf(files[0], f"{folder} holds {files[0].name}, a GGUF file")


def _says_gguf(path: Path, what: str) -> str:
    says = gguf_texts(path)
    names = [says[key] for key in ("general.name", "general.organization") if says.get(key)]
    keys = ("general.source.repo_url", "general.source.url", "general.base_model.0.repo_url")
    source = next((says[key] for key in keys if says.get(key)), "")
    page = HUB_PAGE.fullmatch(source)
    told = f" It calls itself {' of '.join(names)}." if names else ""
    told += f" It says that it comes from {page[1] if page else source}." if source else ""
    return f"{what}, which can be run and not tuned. Name the model it was made from, in safetensors.{told}"


def _without_config(folder: Path) -> str:
    what = f"{folder} holds no model, it has no {CONFIG}"
    if not any(folder.iterdir()):
        return f"{what}: it is empty. `hf download OWNER/NAME --local-dir {shlex.quote(str(folder))}` fills it."
    if inside := _models_in(folder):
        return f"{what}; {inside[0]} does. Write base = {json.dumps(str(inside[0]), ensure_ascii=False)}."
    form = next((words for pattern, words in OTHER_FORMS.items() if _named(folder, pattern)), None)
    if form:
        return f"{folder} holds {form}, and qtune tunes safetensors with a {CONFIG}. Name the model it was made from."
    if pickles := _pickles(folder):
        return f"{what}.{_pickled(pickles[0].name)}"
    if weights := _named(folder, "*.safetensors"):
        return f"{folder} holds {weights[0].name} and no {CONFIG}. Put the one that came with the weights beside it."
    if tokenizers := [name for name in TOKENIZERS if (folder / name).is_file()]:
        return (
            f"{folder} holds a tokenizer ({tokenizers[0]}) and no model, it has no {CONFIG}. Download the whole model."
        )
    return f"{what}."


def _models_in(folder: Path) -> list[Path]:
    """Folders of models a step or, in the hub's cache, two below; the newest first."""
    configs = [*folder.glob(f"*/{CONFIG}"), *folder.glob(f"snapshots/*/{CONFIG}")]
    return [path.parent for path in sorted(configs, key=lambda path: path.stat().st_mtime, reverse=True)]


def _config(folder: Path, trust_remote_code: bool) -> str | None:
    path = folder / CONFIG
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as wrong:
        return f"{path} cannot be used ({wrong})."
    if not isinstance(described, dict):
        return f"{path} cannot be used (it holds no JSON object)."
    fault = fault_of_config(described, None if trust_remote_code else causal_classes().values())
    return f"{folder} {fault}" if fault else None


def fault_of_config(described: Mapping[str, Any], causal: Collection[str] | None) -> str | None:
    """What the model of a config.json is that cannot be tuned, as a clause; `causal` are the classes that can be, none
    of which is asked for where it is None."""
    if not described.get("architectures") and not described.get("model_type"):
        return f"has a {CONFIG} with neither architectures nor model_type, and is no model that transformers knows."
    kinds = described.get("architectures") or [f"{described['model_type']} model"]
    text = text_config_of(described)
    if causal and text is None and isinstance(kinds, list) and not set(map(str, kinds)) & set(causal):
        senses = [name for name in SENSES if name in described]
        reads = f", which reads more than text ({senses[0]})" if senses else ""
        return f"is a {kinds[0]}{reads}, and qtune tunes {TUNABLE}."
    kind = (text or described).get("model_type")
    if kind in NOT_YET:
        return f"is of type {kind}, which cannot be tuned yet: {NOT_YET[kind]}. Those that can are in docs/models.md."
    settings = quantization_of(described)
    if settings and not is_read_from_codes(described) and not is_in_4_bits(described):
        return f"is quantised already ({settings.get('quant_method', 'unknown')}). {UNQUANTISED}"
    if is_in_4_bits(described) and settings.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        return f"stores its 4 bits as {settings['bnb_4bit_quant_storage']}, and only uint8 can be read. {UNQUANTISED}"
    if isinstance(found := described.get("quantization"), dict) and "bits" in found:
        return f"is quantised already (for MLX). {UNQUANTISED}"
    absent = [name for name in SIZES if name not in described]
    if absent and text is None and described.get("model_type") in SAYS_ALL_SIZES:
        return (
            f"has a {CONFIG} that lacks {' and '.join(absent)}, and a default would describe another model. Take the"
            " one that came with the weights."
        )
    return None


def quantization_of(described: Mapping[str, Any]) -> Mapping[str, Any]:
    """How a config.json says that the weights are quantised; empty where they are not."""
    settings = described.get("quantization_config")
    return settings if isinstance(settings, Mapping) else {}


def is_read_from_codes(described: Mapping[str, Any]) -> bool:
    return quantization_of(described).get("quant_method") in FROM_CODES


def is_in_4_bits(described: Mapping[str, Any]) -> bool:
    """By bitsandbytes, to be used as they are."""
    settings = quantization_of(described)
    is_4_bit = settings.get("load_in_4bit") or settings.get("_load_in_4bit")
    return settings.get("quant_method") == "bitsandbytes" and bool(is_4_bit)


def _weights(folder: Path, needs_weights: bool) -> str | None:
    """What is wrong with the weights beside a config.json."""
    if not (folder / SINGLE_NAME).is_file() and not (folder / INDEX_NAME).is_file():
        pickles = _pickles(folder)
        if not needs_weights and not pickles:
            return None
        instead = _pickled(pickles[0].name) if pickles else " Download the base again."
        return f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}.{instead}"
    try:
        apart = files_without_text(folder)
        files = [path for path in weight_files(folder) if path.name not in apart]
    except ModelError as fault:
        return str(fault)
    if absent := [path.name for path in files if not path.is_file()]:
        return f"{folder} lacks {', '.join(absent)}. Download the base again." if needs_weights else None
    pointer = next((path for path in files if _is_pointer(path)), None)
    return (
        f"{pointer} is a pointer of Git LFS and no weights. `git lfs pull` in {folder} gets them." if pointer else None
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, there or not. Raises ModelError for an index that names something else."""
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    index = read_index(folder / INDEX_NAME)
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def read_index(path: Path) -> dict[str, Any]:
    """A shard index, whose `weight_map` names safetensors files beside it; raises ModelError for any other."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names = set(index["weight_map"].values())
        if not all(isinstance(name, str) for name in names) or not isinstance(index.get("metadata", {}), dict):
            raise TypeError
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ModelError(f"{path}: is no shard index, it has no weight_map from tensors to files.") from None
    if outside := sorted(name for name in names if Path(name).name != name or "\0" in name):
        raise ModelError(f"{path}: names files outside its folder ({', '.join(map(ascii, outside))}).")
    if other := sorted(name for name in names if not name.endswith(".safetensors")):
        raise ModelError(f"{path}: names files that are not .safetensors ({', '.join(map(ascii, other))}).")
    return index


def _is_pointer(path: Path) -> bool:
    if path.stat().st_size > LEAST_WEIGHTS:
        return False
    return path.read_bytes().startswith(LFS_POINTER)


def _pickles(folder: Path) -> list[Path]:
    return sorted(path for pattern in PICKLES for path in _named(folder, pattern))


def _pickled(name: str) -> str:
    return (
        f" {name} is a pickle, which can run code when it is opened, and is not read. Convert it where you trust it:"
        " load the model with transformers and `save_pretrained` it, which writes safetensors."
    )


def _named(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.is_file())


def gguf_texts(path: Path) -> dict[str, str]:
    """What a GGUF file says of itself: the values at its head that are texts, by key; nothing for a file that is none.

    The layout is that of ggml's docs/gguf.md: magic, version, two counts, then pairs of key and typed value.
    """
    try:
        with path.open("rb") as file:
            head = BytesIO(file.read(GGUF_HEAD_BYTES))
    except OSError:
        return {}
    return dict(_head_texts(head)) if head.read(len(GGUF_MAGIC)) == GGUF_MAGIC else {}


def _head_texts(head: BytesIO) -> Iterator[tuple[str, str]]:
    """Up to where the head ends, or holds what is no value."""
    try:
        _, _, pairs = struct.unpack("<IQQ", head.read(20))
        for _ in range(pairs):
            key, kind = _text(head), _number(head, 4)
            if kind == GGUF_STRING:
                yield key, _text(head)
            else:
                _skip(head, kind)
    except (struct.error, KeyError, UnicodeDecodeError, OverflowError):
        return


def _number(head: BytesIO, size: int) -> int:
    return int(struct.unpack("<I" if size == 4 else "<Q", head.read(size))[0])


def _text(head: BytesIO) -> str:
    length = _number(head, 8)
    content = head.read(length)
    if len(content) < length:
        raise struct.error("the head ends here")
    return content.decode()


def _skip(head: BytesIO, kind: int) -> None:
    if kind != GGUF_ARRAY:
        head.read(GGUF_SIZES[kind])
        return
    inner, count = _number(head, 4), _number(head, 8)
    if inner == GGUF_STRING:
        for _ in range(count):
            _text(head)
    else:
        head.read(GGUF_SIZES[inner] * count)
