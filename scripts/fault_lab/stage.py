"""What the lanes work on: a tiny base, rows and a recipe, and qtune in a process that is watched."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent.parent
SPECIAL = ["<s>", "<|end|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ROW = '{"question": "Which class of drug is captopril?", "answer": "ACE inhibitor"}\n'
RECIPE = """\
name = "t"
[model]
base = "./base"
[data]
train = "rows.jsonl"
held_out_fraction = 0.2
[train]
max_steps = 1
epochs = 50
[evaluate]
metric = "exact_match"
rows = 2
max_new_tokens = 2
"""

# Every way out of the process is written down and refused. A fake `kernels` package is what bitsandbytes would ask.
SHIM = """\
import os, socket

def _refuse(name):
    def refused(*args, **kwargs):
        if name != "getaddrinfo" and args and getattr(args[0], "family", None) == socket.AF_UNIX:
            return real[name](*args, **kwargs)
        with open(os.environ["FAULT_LAB_SOCKETS"], "a") as file:
            file.write(f"{name}{args[-1:]}\\n")
        raise OSError("no network here")
    return refused

real = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex", "sendto")}
for name in real:
    setattr(socket.socket, name, _refuse(name))
socket.getaddrinfo = _refuse("getaddrinfo")
"""
KERNELS = """\
import socket

def get_kernel(*args, **kwargs):
    socket.create_connection(("198.51.100.1", 443), timeout=1)
"""


@dataclass(frozen=True)
class Ended:
    """How a watched qtune ended: its exit status, what it printed, and the connections that it tried."""

    status: int
    printed: str
    sockets: tuple[str, ...]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )


def make_base(folder: Path) -> Path:
    """A random Llama of one layer, as a user would have it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_workplace(folder: Path) -> Path:
    """t.toml over ten rows and a base beside it; returns the folder."""
    folder.mkdir(parents=True)
    make_base(folder / "base")
    (folder / "rows.jsonl").write_text(ROW * 10, encoding="utf-8")
    (folder / "t.toml").write_text(RECIPE, encoding="utf-8")
    return folder


def qtune(workplace: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> Ended:
    """One verb in `workplace`, offline or not as it likes, with every connection refused and written down."""
    shim, tried = workplace / ".shim", workplace / ".sockets"
    (shim / "kernels").mkdir(parents=True, exist_ok=True)
    (shim / "sitecustomize.py").write_text(SHIM, encoding="utf-8")
    (shim / "kernels" / "__init__.py").write_text(KERNELS, encoding="utf-8")
    tried.write_text("", encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-m", "qtune", *arguments],
        cwd=workplace,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "PYTHONPATH": f"{shim}{os.pathsep}{ROOT}",
            "FAULT_LAB_SOCKETS": str(tried),
            "HF_HOME": str(workplace / ".hub"),
            "QTUNE_CACHE": "off",
            **(environment or {}),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    return Ended(ended.returncode, ended.stdout + ended.stderr, tuple(tried.read_text(encoding="utf-8").splitlines()))
