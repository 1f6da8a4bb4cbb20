"""A GGUF family is one file: names, order of rows, what the file says, and what is refused.

llama.cpp knows none that is made up, so the file is read back with the gguf package.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from adding import qtune_with
from gguf import GGUFReader
from made_bases import byte_level, make_base
from made_runs import edit_json, make_run
from safetensors.torch import load_file
from tokenizers import Regex, pre_tokenizers

from qtune.errors import ModelError
from qtune.gguf.export import export
from qtune.model import fingerprint
from qtune.rundir import write_json

VERB = "import sys; from qtune import cli; sys.exit(cli.main(sys.argv[1:]))"


def test_a_family_from_one_file_is_exported(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{3}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    base = make_base(tmp_path / "base", "granite", tokenizer, residual_multiplier=0.5)
    run = make_run(tmp_path / "run", base, compute_dtype="float32", quantization="none", strength=0.0)
    write_json(run.probe, [])  # rows to ask llama.cpp on: it cannot be asked
    with pytest.raises(ModelError, match="granite models cannot be exported to GGUF yet; llama, mistral, qwen2, qwen3"):
        export(run, tmp_path / "refused", "gguf", "f32")

    with_pebble = qtune_with(Path(__file__).with_name("pebble.py"), "gguf/architectures", tmp_path)
    done = with_pebble(VERB, "export", run.path, "--quant", "f32", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    reader = GGUFReader(tmp_path / "out" / "model.gguf")
    said = {name: reader.get_field(name).contents() for name in ("general.architecture", "tokenizer.ggml.pre")}
    assert said == {"general.architecture": "pebble", "tokenizer.ggml.pre": "pebble-bpe"}
    assert reader.get_field("pebble.residual_scale").contents() == 0.5
    assert reader.get_field("pebble.block_count").contents() == 4
    weights, places = load_file(base / "model.safetensors"), {each.name: each.data for each in reader.tensors}
    assert len(places) == len(weights)
    layer = "model.layers.3.self_attn"
    assert np.array_equal(places["blk.3.pebble.q_proj.weight"], weights[f"{layer}.q_proj.weight"].numpy())
    halves = weights[f"{layer}.k_proj.weight"].view(2, 2, 8, 64)  # (H, halves of D, D / 2, I)
    beside = torch.stack(halves.unbind(1), 2).reshape(32, 64)
    assert np.array_equal(places["blk.3.pebble.k_proj.weight"], beside.numpy())

    edit_json(base / "config.json", logits_scaling=2.0)
    lock = json.loads(run.lock.read_text())
    lock["base"] |= {"sha256": fingerprint.fingerprint(base), "glance_sha256": fingerprint.glance(base)}
    run.lock.write_text(json.dumps(lock))
    done = with_pebble(VERB, "export", run.path, "--output", "other")
    assert done.returncode == 2
    assert "cannot be exported to GGUF: its logits are scaled." in done.stderr
