"""What an export costs and how close it comes: a table for real runs, and one for a large checkpoint of random weights.

scripts/bench_export.py runs/a runs/b          every run in f16, in 8 bits and as a LoRA, beside it live in llama.cpp
scripts/bench_export.py --synthetic 4          merge and export of so many GB, seconds beside a copy, and peak memory
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qtune import __version__, cache_dir
from qtune.merge.safetensors_shards import write_shard
from qtune.model import base_files, fingerprint
from qtune.model.checkpoint import TensorSpec
from qtune.rundir import RunDir, read_json, write_json

HIDDEN, INNER, VOCABULARY, HEADS, GROUPS, RANK = 2048, 8192, 32000, 32, 8, 16
WIDTHS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN * GROUPS // HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN * GROUPS // HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
NORMS = ("input_layernorm", "post_attention_layernorm")
FORMS = {"f16": ("--quant", "f16"), "q8_0": ("--quant", "q8_0"), "LoRA alone": ("--to", "adapter-gguf")}
# Peak of the process above what importing took, so that it is the work that is counted.
CHILD = """\
import json, sys, time
from pathlib import Path
from qtune.gguf.export import export
from qtune.merge.merge import chosen_onto
from qtune.merge.merge import merge
from qtune.rundir import RunDir

def high_water():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))

what, folder, output = sys.argv[1], RunDir.open(Path(sys.argv[2])), Path(sys.argv[3])
before, start, start_cpu = high_water(), time.perf_counter(), time.process_time()
if what == "merge":
    merge(folder, output, chosen_onto(folder, None))
else:
    export(folder, output, "gguf", what)
seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
print(json.dumps({"seconds": seconds, "cpu": cpu, "bytes": high_water() - before}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="finished run folders")
    parser.add_argument("--synthetic", type=float, metavar="GB", help="size of a checkpoint of random weights")
    options = parser.parse_args()
    if options.runs:
        compare_runs(options.runs)
    if options.synthetic:
        with tempfile.TemporaryDirectory(prefix="bench_export_") as folder:
            time_synthetic(Path(folder), options.synthetic)


def compare_runs(runs: list[Path]) -> None:
    print(
        "| run | stored as | bytes | mean KL | same next token | another as likely | greedy | ends | loss live | loss |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for run in runs:
        for form, asked in FORMS.items():
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "qtune", "export", str(run), *asked, "--json"]
                command += ["--output", f"{folder}/out"]
                done = subprocess.run(
                    command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
                )
                if not Path(folder, "out").is_dir():
                    sys.exit(done.stderr)
                report = json.loads(Path(folder, "out", "export_report.json").read_text())
            print_verdict(run.name, form, report)


def print_verdict(name: str, form: str, report: dict[str, Any]) -> None:
    verdict = report["verdict"]
    if verdict is None:
        sys.exit("; ".join(report["notes"]))
    same = sum(answer["same"] for answer in verdict["greedy"])
    print(
        f"| {name} | {form} | {report['bytes']:,} | {verdict['mean_kl']:.1e} |"
        f" {100 * verdict['agreement_fraction']:.2f} % | {100 * verdict['near_tie_fraction']:.2f} % |"
        f" {same} of {len(verdict['greedy'])} | {verdict['ends_found']} of {verdict['ends']} |"
        f" {verdict['live_loss']:.4f} | {verdict['file_loss']:.4f} |",
        flush=True,
    )


def time_synthetic(folder: Path, gigabytes: float) -> None:
    run, modules = make_run(folder, gigabytes)
    largest = VOCABULARY * HIDDEN
    print(f"largest tensor in float32 {4 * largest / 2**20:,.0f} MiB")
    print(
        "| base held in | what | its hash | seconds | processor seconds | copy just before | speed beside it | peak"
        " above start |"
    )
    print("|---|---|---|---|---|---|---|---|")
    remember_base(folder)
    for held, quantized in (("16 bits", []), ("NF4", modules)):
        edit_lock(run, quantized)
        for what, is_known in (("merge", False), ("merge", True), ("f16", True), ("q8_0", True)):
            copied = time_copy(folder / "base", folder / "copy")
            command = [sys.executable, "-c", CHILD, what, str(run.path), str(folder / "out")]
            cache = {cache_dir.VARIABLE: str(folder / "cache") if is_known else cache_dir.OFF}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **cache})
            if done.returncode:
                sys.exit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            shutil.rmtree(folder / "out")
            line = f"| {held} | {what} | {'known' if is_known else 'hashed'} | {found['seconds']:.1f} |"
            line += f" {found['cpu']:.1f} | {copied:.1f} | {copied / found['seconds']:.2f} |"
            print(f"{line} {found['bytes'] / 2**20:,.0f} MiB |", flush=True)


def remember_base(folder: Path) -> None:
    """As a run leaves it that was trained on this machine; what was written just now is not remembered yet."""
    time.sleep(3)
    os.environ[cache_dir.VARIABLE] = str(folder / "cache")
    fingerprint.fingerprint(folder / "base")


def time_copy(source: Path, target: Path) -> float:
    """Seconds of `cp -r`, until it is on the disk as a merge is."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", "-f", str(target)], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def make_run(folder: Path, gigabytes: float) -> tuple[RunDir, list[str]]:
    """A run on a Llama of random bfloat16 weights, as training leaves it, and the modules it adapts."""
    per_layer = sum(rows * columns for rows, columns in WIDTHS.values())
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * VOCABULARY * HIDDEN) / per_layer))
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shapes["model.norm.weight"] = (HIDDEN,)
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{module}.weight": shape for module, shape in WIDTHS.items()}
        shapes |= {f"model.layers.{layer}.{norm}.weight": (HIDDEN,) for norm in NORMS}
    base_folder = folder / "base"
    base_folder.mkdir()
    for path in base_files.DEMO_BASE.glob("*token*"):
        shutil.copy(path, base_folder)
    (base_folder / "config.json").write_text(json.dumps(config(layers)))
    specs = [TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    write_shard(base_folder / "model.safetensors", {"format": "pt"}, specs, weights(specs))
    modules = [f"model.layers.{layer}.{module}" for layer in range(layers) for module in WIDTHS]
    run = RunDir.create(folder / "run", "", {})
    write_adapter(run.adapter, modules)
    write_json(
        run.lock,
        {
            "base": {"name": "synthetic", "folder": str(base_folder), "sha256": fingerprint.fingerprint(base_folder)},
            "model": {"base": str(base_folder)},
            "quantized_modules": [],
            "quantization": {"type": "nf4", "double": True, "blocksize": 64, "quant_storage": "uint8"},
            "compute_dtype": "bfloat16",
            "stop_token_ids": [1],
            "recipe": {},
            "data_sha256": "",
            "versions": {"qtune": __version__},
        },
    )
    return run, modules


def edit_lock(run: RunDir, quantized: list[str]) -> None:
    """Say which modules the run held in NF4; a merge of before says no more which base an export is folded onto."""
    run.merge.unlink(missing_ok=True)
    write_json(run.lock, {**read_json(run.lock), "quantized_modules": quantized})


def config(layers: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }


def weights(specs: list[TensorSpec]) -> Iterator[torch.Tensor]:
    torch.manual_seed(0)
    for spec in specs:
        yield torch.randn(spec.shape, dtype=spec.dtype) * 0.02


def write_adapter(folder: Path, modules: list[str]) -> None:
    os.makedirs(folder)
    tensors = {}
    for module in modules:
        rows, columns = WIDTHS[module.split(".", 3)[3]]
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, columns) * 0.02
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, RANK) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    main()
