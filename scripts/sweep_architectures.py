#!/usr/bin/env python3
"""Every decoder of the installed transformers, tiny and of random weights, from data to merge.

    scripts/sweep_architectures.py                      all of them, a table in Markdown
    scripts/sweep_architectures.py qwen3_5 mistral      these

Each is saved to a folder and goes through `qtune run` (NF4, packs, float32, three steps) and `qtune merge` in a process
of its own. What it trained on is then held against transformers: the base's held-out loss of the run against that of
one document at a time under the model's own attention, the adapter's logits in plain transformers and peft, and, where
there is a sliding window, a greedy continuation of a prompt that is longer than it.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qtune import cli
from qtune.data.packing import packed_rows
from qtune.data.prepare import prepare
from qtune.memory import nf4
from qtune.model import base
from qtune.model.open_model import open_run
from qtune.model.packing_probe import own_attention
from qtune.resume import recipe_then
from qtune.rundir import RunDir, read_json

SECONDS_EACH = 240
SPREAD = 0.15  # of random weights: transformers' 0.02 leaves little behind the embedding that could leak
SPECIAL = ["<s>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Encoders, encoder-decoders and models that hear or see: no causal language model to tune.
NOT_DECODERS = (
    "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert",
    "cpmant", "data2vec-text", "electra", "emu3", "ernie", "fuyu", "gemma4_assistant", "gemma4_unified_assistant",
    "git", "got_ocr2", "marian", "mbart", "megatron-bert", "mllama", "moshi", "moss_transcribe_diarize", "musicgen",
    "musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "reformer", "rembert", "roberta",
    "roberta-prelayernorm", "roc_bert", "roformer", "trocr", "whisper", "xlm", "xlm-roberta", "xlm-roberta-xl",
    "xlnet", "xmod",
)  # fmt: skip
SMALL = {
    "vocab_size": 262, "vocab_size_per_layer_input": 262, "max_position_embeddings": 512, "n_positions": 512,
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "dim": 64, "hidden_size_per_layer_input": 16,
    "intermediate_size": 128, "ffn_dim": 128, "n_inner": 128, "intermediate_size_mlp": 128, "ffn_hidden_size": 128,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32, "moe_latent_size": 32, "expert_ffn_hidden_size": 32,
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "num_blocks": 4,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "num_key_value_heads": 2, "num_global_key_value_heads": 2, "multi_query": False,
    "head_dim": 16, "global_head_dim": 16, "kv_channels": 16, "rotary_dim": 8,
    "sliding_window": 8, "window_size": 8, "attention_window_size": 8, "attention_chunk_size": 8, "keep_window_size": 8,
    "q_lora_rank": 32, "kv_lora_rank": 32, "o_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1,
    "num_expert_group": 1, "first_k_dense_replace": 1, "moe_layer_start_index": 1, "n_shared_experts": 1,
    "num_shared_experts": 1, "zero_expert_num": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_heads": 4, "linear_head_dim": 16,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_d_state": 16, "mamba_n_groups": 1,
    "mamba_head_dim": 16, "mamba_num_heads": 8, "ssm_state_size": 16, "n_groups": 1, "state_size": 16,
    "time_step_rank": 4, "mamba_dt_rank": 4, "lru_width": 64, "attention_hidden_size": 64, "chunk_size": 16,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
EXACT = 1e-4  # of a loss in nats, and of logits' spread: float32 in another order of summation


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and six special ones."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.add_special_tokens(SPECIAL)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="<|end|>", pad_token="<|pad|>", chat_template=CHAT_TEMPLATE
    )


def small_config(kind: str) -> Any:
    """The architecture's own configuration, four layers deep, of every kind of layer that it has."""
    whole = CONFIG_MAPPING[kind]()
    has = whole.to_dict()
    changes = {key: value for key, value in SMALL.items() if key in has}
    if "head_dim" in has and has["head_dim"] == has.get(
        "qk_rope_head_dim"
    ):  # of latent attention it is what the rotation turns
        changes["head_dim"] = changes["qk_rope_head_dim"]
    for key in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = list(dict.fromkeys(has.get(key) or ()))
        if kinds:
            changes[key] = [kinds[i % len(kinds)] for i in range(4)]
    return CONFIG_MAPPING[kind](**changes)


def make(kind: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(kind), dtype=torch.float32)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_matrix = isinstance(module, torch.nn.Linear | torch.nn.Embedding) and name == "weight"
            if is_matrix or (parameter.ndim == 3 and name.endswith("_proj")):
                torch.nn.init.normal_(parameter, 0.0, SPREAD)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def recipe(folder: Path) -> Path:
    rows = [{"question": f"what is {'x' * (i % 9)}{i}?", "answer": f"it is {i} times {i * i}"} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "t.toml"
    path.write_text(
        f'name = "t"\n[model]\nbase = "{folder / "base"}"\ncompute_dtype = "float32"\n[lora]\nrank = 4\n'
        '[data]\ntrain = "rows.jsonl"\nheld_out_fraction = 0.3\nmax_tokens = 128\n[train]\nmax_steps = 3\n'
        'learning_rate = 1e-3\n[evaluate]\nmetric = "none"\ngeneral = "none"\n'
    )
    return path


def verb(log: Path, *arguments: str) -> tuple[int, str]:
    """The exit code of a verb, and the last thing it said; all of it goes to `log`."""
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
    said = [line for line in log.read_text().splitlines() if line.strip()]
    return code, said[-1] if said else ""


def alone_loss(model: PreTrainedModel, rows: Any) -> float:
    """Mean nats over labels, one document at a time under the model's own attention."""
    nats, tokens = 0.0, 0
    for row in rows:
        start = 0
        for length in row["seq_lengths"]:
            ids = torch.as_tensor(row["input_ids"][start : start + length]).long()[None]
            labels = torch.as_tensor(row["labels"][start : start + length]).long()[None]
            logits = model(input_ids=ids, use_cache=False).logits
            wanted = labels[:, 1:]
            nats += float(cross_entropy(logits[:, :-1].transpose(1, 2), wanted, reduction="sum", ignore_index=-100))
            tokens += int((wanted != -100).sum())
            start += length
    return nats / tokens


def continued(model: torch.nn.Module, ids: torch.Tensor) -> Any:
    """Six greedy tokens, or what kind of fault there is instead: some tiny shapes are too small for a model's cache."""
    try:
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
        return model.generate(input_ids=ids, **settings).tolist()
    except Exception as fault:
        return type(fault)


def spread_apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / one.std())


def examine(kind: str, folder: Path) -> Iterator[tuple[str, Any]]:
    """Findings by name, in the order they are made; what fails ends them."""
    try:
        make(kind, folder / "base")
    except Exception as fault:
        yield "made", f"could not be made so small ({type(fault).__name__}: {str(fault).splitlines()[0][:80]})"
        return
    log, run = folder / "log.txt", folder / "run"
    code, said = verb(log, "run", str(recipe(folder)), "--output", str(run))
    yield "run", code
    if code:
        yield "said", said
        return
    opened = RunDir.open(run)
    probe = read_json(opened.lock)["packing_probe"]
    yield "leaks", probe["leaks"]
    tuned = open_run(opened)
    settled = recipe_then(opened)
    prepared = prepare(settled, tuned.tokenizer)
    rows = packed_rows(prepared.held_out, prepared.held_out_packs)
    with torch.no_grad():
        with own_attention(tuned.model), tuned.model.disable_adapter():
            apart = abs(alone_loss(tuned.model, rows) - read_json(opened.scores)["base"]["held_out_loss"])
        yield "loss apart", apart
        ids = torch.as_tensor(rows[0]["input_ids"][: rows[0]["seq_lengths"][0]]).long()[None]
        ours = continued(tuned.model, ids)
        with own_attention(tuned.model):
            yield "generates alike", ours == continued(tuned.model, ids)
        plain = AutoModelForCausalLM.from_pretrained(
            folder / "base",
            dtype=torch.float32,
            quantization_config=nf4.config(settled.model.double_quantization, torch.float32, type(tuned.without_peft)),
            device_map={"": "cpu"},
        )
        nf4.keep_weights_as_quantised(plain)
        adapted = PeftModel.from_pretrained(plain, opened.adapter).eval()
        with own_attention(tuned.model):
            logits = tuned.model(input_ids=ids, use_cache=False).logits
        yield "peft apart", spread_apart(adapted(input_ids=ids, use_cache=False).logits, logits)
    code, said = verb(log, "merge", str(run), "--output", str(folder / "merged"), "--onto", "dequantised")
    yield "merge", code
    if code:
        yield "said", said
    if opened.merge.is_file():
        yield "merge KL", (read_json(opened.merge).get("verdict") or {}).get("mean_kl")


def child(kind: str, folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    try:
        for finding in examine(kind, Path(folder)):
            pipe.send(finding)
    except Exception as fault:
        pipe.send(("failed", f"{type(fault).__name__}: {str(fault).splitlines()[0][:120] if str(fault) else ''}"))
    pipe.close()
    os._exit(0)  # threads of the libraries do not outlive a fork, and leaving would wait for them


def swept(kind: str) -> dict[str, Any]:
    """What one architecture comes to."""
    found: dict[str, Any] = {}
    mine, theirs = multiprocessing.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("fork").Process(target=child, args=(kind, folder, theirs))
        process.start()
        theirs.close()
        try:
            while mine.poll(SECONDS_EACH):
                name, value = mine.recv()
                found[name] = value
            found["failed"] = f"took over {SECONDS_EACH} s"
            process.kill()
        except EOFError:
            pass
        process.join()
        if process.exitcode and "failed" not in found:
            found["failed"] = f"ended with {process.exitcode}"
    return found


def outcome(found: dict[str, Any]) -> str:
    """One word for a row, the worst first."""
    if "made" in found:
        return "not made"
    if found.get("failed") or found.get("run") == 1:
        return "OUR FAULT"
    if found.get("run"):
        return "refused"
    if not found["loss apart"] <= EXACT or not found["generates alike"]:
        return "WRONG"
    if found.get("merge"):
        return "trained, not merged"
    return "right, a document a pass" if found["leaks"] else "right"


def line(kind: str, found: dict[str, Any]) -> str:
    def number(name: str) -> str:
        value = found.get(name)
        return "" if value is None else f"{value:.0e}"

    said = found.get("made") or found.get("failed") or found.get("said", "")
    cells = (kind, outcome(found), number("loss apart"), number("peft apart"), number("merge KL"), said[:160])
    return "| " + " | ".join(cells).replace("\n", " ") + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", help="model types; all decoders where none is named")
    kinds = parser.parse_args().kinds or [k for k in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if k not in NOT_DECODERS]
    base.quiet_libraries()
    print(
        "| model type | outcome | loss apart | logits in peft apart | KL of merge | said |\n|---|---|---|---|---|---|"
    )
    wrong = 0
    for kind in kinds:
        found = swept(kind)
        wrong += outcome(found) in ("WRONG", "OUR FAULT")
        print(line(kind, found), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
