"""How one uses what a run made: commands and a snippet, ready to paste."""

import shlex
from pathlib import Path
from typing import NamedTuple

from qtune.report import tables
from qtune.report.record import Record
from qtune.report.words import one_line

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class Use(NamedTuple):
    """One way to use a run: what for, what to paste, and the language it is in."""

    title: str
    text: str
    language: str = "sh"


def uses(found: Record) -> list[Use]:
    """Talk to it, fold it into its base, serve it, load it; none without an adapter."""
    if not found.has_adapter or not found.lock:
        return []
    chat, merge, _ = tables.next_commands(found.run)
    base, adapter = base_place(found), str(found.run.adapter)
    command = vllm_command(found, base, adapter)
    return [
        Use("Talk to it, base and tuned side by side", f"{chat} --compare"),
        Use("Fold it into its base: a plain model folder", merge),
        *([Use("Serve it with vLLM, beside its base", command)] if command else []),
        Use("Load it in Python, with peft alone", peft_snippet(base, adapter), "python"),
    ]


def base_title(found: Record) -> str:
    """What to call the base before others: a hub name, or a folder by its last part."""
    name = str((found.lock or {})["base"]["name"])
    return "the demo base inside qtune" if name == "demo" else one_line(folder_name(name))


def base_place(found: Record) -> str:
    """The hub name of the base, or its folder on this machine."""
    assert found.lock is not None, "only a run with a lock has a base"
    return found.base_on_hub or str(found.lock["base"]["folder"])


def vllm_command(found: Record, base: str, adapter: str) -> str | None:
    """None for an adapter that vLLM does not take: a DoRA one, or one of too high a rank."""
    lora = (found.lock or {})["recipe"].get("lora", {})
    rank = next((rank for rank in VLLM_RANKS if rank >= lora.get("rank", 0)), None)
    if rank is None or lora.get("dora"):
        return None
    module = shlex.quote(f"{found.name}={adapter}")
    return f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {rank} --lora-modules {module}"


def peft_snippet(base: str, adapter: str) -> str:
    """Python that loads the adapter on its base; `base` and `adapter` are folders or hub names."""
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "\n"
        f"base = {base!r}\n"
        'model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", device_map="auto")\n'
        f"model = PeftModel.from_pretrained(model, {adapter!r})\n"
        "tokenizer = AutoTokenizer.from_pretrained(base)"
    )


def transformers_snippet(folder: str) -> str:
    """Python that loads a merged model; `folder` is one, or a hub name."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "\n"
        f'model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype="auto", device_map="auto")\n'
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})"
    )


def folder_name(path: str) -> str:
    """The last part of a path, or a hub name as it is: what may be shown to others."""
    return Path(path).name if Path(path).is_absolute() else path
