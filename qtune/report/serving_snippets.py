"""How one uses what a run made: commands and a snippet, ready to paste."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qtune.model import lora_inits
from qtune.model.lora_variants import faults_of
from qtune.recipe import chat_templates
from qtune.report import tables
from qtune.report.run_record import Record
from qtune.report.wording import one_line
from qtune.rundir import RunDir

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
NO_BASE = "only a run with a lock has a base"


class Use(NamedTuple):
    """One way to use a run: what for, what to paste, and the language it is in."""

    title: str
    text: str
    language: str = "sh"


def uses(found: Record) -> list[Use]:
    """Go on with it where it was stopped; talk to it, fold it, serve it, load it, of which none without an adapter."""
    then = tables.NextCommands.of(found.run)
    to_go_on = [Use(f"Go on with it: it was {found.stopped}", then.resume)] if found.stopped else []
    if not found.has_adapter or not found.lock:
        return to_go_on
    base, adapter = base_place(found), str(found.run.adapter)
    command = vllm_command(found, base, adapter)
    return [
        *to_go_on,
        Use("Talk to it, base and tuned side by side", f"{then.chat} --compare"),
        Use("Fold it into its base: a plain model folder", then.merge),
        *([Use("Serve it with vLLM, beside its base", command)] if command else []),
        Use("Load it in Python, with peft alone", peft_snippet(found, base, adapter), "python"),
    ]


def has_towers(found: Record) -> bool:
    """Whether the base is the text model of a checkpoint that holds more."""
    return found.lock is not None and bool(found.lock.base.has_towers)


def only_in_4_bits(found: Record) -> str | None:
    """Why the adapter is wrong on any other base than the one in 4 bits, as a clause; None where it is not."""
    return lora_inits.of_run(found.lock.recipe).not_onto_original if found.lock else None


def faults_of_run(found: Record) -> list[str]:
    """What keeps a server that has the base as its files have it from the adapter, a clause each."""
    towers = "it is for the text model alone, whose layers have other names in the whole" if has_towers(found) else None
    return [fault for fault in (towers, only_in_4_bits(found)) if fault is not None]


def base_title(found: Record) -> str:
    """What to call the base before others: a hub name, or a folder by its last part."""
    assert found.lock is not None, NO_BASE
    name = found.lock.base.name
    return "the demo base inside qtune" if name == "demo" else one_line(folder_name(name))


def started_from(found: Record) -> str | None:
    """The adapter that the run started from: its hub name, or its folder by the last part, and its hash."""
    start = found.lock.start if found.lock else None
    return f"the adapter {one_line(folder_name(start.name))}, SHA-256 {start.sha256}" if start else None


def base_place(found: Record) -> str:
    """The hub name of the base, or its folder on this machine."""
    assert found.lock is not None, NO_BASE
    return found.base_on_hub or found.lock.base.folder


def vllm_command(found: Record, base: str, adapter: str) -> str | None:
    """None for an adapter that vLLM does not take."""
    assert found.lock is not None, NO_BASE
    lora = found.lock.recipe.get("lora", {})
    rank = lora.get("rank", 0)
    if faults_of_run(found):
        return None
    more = {name: lora.get(name) for name in ("rank_pattern", "alpha_pattern")}
    more["trainable_token_indices"] = lora.get("train_tokens")
    if vllm_faults({"r": rank, "use_dora": lora.get("dora", False), **more}):
        return None
    return with_template(vllm_with_adapter(base, found.name, adapter, rank), "--chat-template", found.run, adapter)


def vllm_faults(config: Mapping[str, Any]) -> list[str]:
    """What keeps vLLM from an adapter, a clause each; `config` is its adapter_config.json.

    The loader is vllm/lora/peft_helper.py: it refuses DoRA and modules_to_save (and biases since they became an
    option), and scales every module by one alpha and one rank. Ranks are MaxLoRARanks in vllm/config/lora.py.
    """
    faults = [] if config["r"] <= VLLM_RANKS[-1] else [f"its rank is {config['r']}, and vLLM's highest is 512"]
    return faults + faults_of(config, "vLLM") + faults_of_plain_loaders(config, "vLLM")


def faults_of_plain_loaders(config: Mapping[str, Any], server: str) -> list[str]:
    """What a server that reads A, B, one rank and one alpha would refuse or pass over."""
    faults = []
    if config.get("modules_to_save"):
        faults.append(f"{', '.join(config['modules_to_save'])} was trained whole, and {server} takes A and B alone")
    if config.get("trainable_token_indices"):
        faults.append(f"rows of the embedding were trained, and {server} takes A and B alone")
    if config.get("bias", "none") != "none":
        faults.append(f"it trained biases, and {server} takes A and B alone")
    if config.get("alpha_pattern") or config.get("rank_pattern"):
        faults.append(f"rank or alpha differ by module, and {server} scales them all alike")
    if config.get("target_parameters"):
        faults.append(f"it adapts experts as parameters, which {server} reads in another form")
    return faults


def vllm_with_adapter(base: str, name: str, adapter: str, rank: int) -> str:
    """The command that serves `adapter` as the model `name`, with the lowest --max-lora-rank that holds `rank`."""
    most = next(each for each in VLLM_RANKS if each >= rank)
    module = shlex.quote(f"{name}={adapter}")
    return f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {most} --lora-modules {module}"


def with_template(command: str, option: str, run: RunDir, adapter: str) -> str:
    """A server's command with the run's own chat template, where it has one beside its adapter; of an adapter on the
    hub that is downloaded first."""
    if not has_template(run):
        return command
    if adapter == str(run.adapter):
        return f"{command} {option} {shlex.quote(f'{adapter}/{chat_templates.FILE}')}"
    return f"hf download {adapter} {chat_templates.FILE} --local-dir .\n{command} {option} {chat_templates.FILE}"


def has_template(run: RunDir) -> bool:
    return (run.adapter / chat_templates.FILE).is_file()


# The text model of a checkpoint that holds more, by its own class: its configuration, and what the checkpoint's names
# become. The parts of a name that are taken away are those of `recipe.text_part`.
TEXT_ALONE = (
    "config = AutoConfig.from_pretrained(base).text_config  # the text model alone\n"
    'names = {r"^(model\\.)?language_model\\.lm_head": "lm_head",\n'
    '         r"^(model\\.)?(language_model|text_model)\\.(model\\.)?": "model."}\n'
)


def peft_snippet(found: Record, base: str, adapter: str) -> str:
    """Python that loads the adapter on its base; `base` and `adapter` are folders or hub names."""
    lines = [
        "from peft import PeftModel",
        _loading(base, has_towers(found), _in_4_bits(found)),
        f"model = PeftModel.from_pretrained(model, {adapter!r})",
        "tokenizer = AutoTokenizer.from_pretrained(base)",
    ]
    if has_template(found.run):
        is_here, name = adapter == str(found.run.adapter), chat_templates.FILE
        place = repr(f"{adapter}/{name}") if is_here else f"hf_hub_download({adapter!r}, {name!r})"
        lines += [] if is_here else ["from huggingface_hub import hf_hub_download"]
        lines.append(f'tokenizer.chat_template = open({place}, encoding="utf-8").read()')
    return "\n".join(lines)


def transformers_snippet(folder: str, has_towers: bool = False) -> str:
    """Python that loads a merged model, or its text model; `folder` is one, or a hub name."""
    return f"{_loading(folder, has_towers)}\ntokenizer = AutoTokenizer.from_pretrained(base)"


def _in_4_bits(found: Record) -> str:
    """The lines that load the base as the adapter needs it, where it holds part of what rounding took."""
    if only_in_4_bits(found) is None:
        return ""
    is_double = bool(found.lock and found.lock.quantization and found.lock.quantization.double)
    return (
        "in_4_bits = BitsAndBytesConfig(  # without it the adapter is wrong: it holds part of what rounding took\n"
        f'    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant={is_double})\n'
    )


def _loading(place: str, has_towers: bool, in_4_bits: str = "") -> str:
    config, given = ("AutoConfig, ", "config=config, key_mapping=names, ") if has_towers else ("", "")
    bits, given = (", BitsAndBytesConfig", f"{given}quantization_config=in_4_bits, ") if in_4_bits else ("", given)
    return (
        f"from transformers import {config}AutoModelForCausalLM, AutoTokenizer{bits}\n"
        "\n"
        f"base = {place!r}\n"
        f"{TEXT_ALONE if has_towers else ''}"
        f"{in_4_bits}"
        f'model = AutoModelForCausalLM.from_pretrained(base, {given}dtype="auto", device_map="auto")'
    )


def folder_name(path: str) -> str:
    """The last part of a path, or a hub name as it is: what may be shown to others."""
    return Path(path).name if Path(path).is_absolute() else path
