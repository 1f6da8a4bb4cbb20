"""Where the weights of a Hugging Face checkpoint stand in a GGUF file, and what the file says of their architecture.

What is a family's own is in `architectures`. Llama 3's stretched RoPE is no key but a tensor, without which a file
loads and is quietly worse.

Letters: H heads, D channels of a head.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qtune.errors import ModelError
from qtune.gguf.architectures import FAMILIES, Family

TOKEN_EMBEDDING, OUTPUT_NORM, OUTPUT = "token_embd.weight", "output_norm.weight", "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMPUTED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")  # old checkpoints stored them


@dataclass(frozen=True)
class Layout:
    """One configuration, understood. `config` is transformers'."""

    config: Any
    family: Family

    @classmethod
    def of(cls, config: Any) -> "Layout":
        """Raises ModelError for an architecture, or a setting of one, that has no GGUF form here."""
        family = FAMILIES.get(config.model_type)
        if family is None:
            raise ModelError(
                f"model.base: {config.model_type} models cannot be exported to GGUF yet; {', '.join(FAMILIES)} can."
                " Use `qtune merge`, and llama.cpp's own convert_hf_to_gguf.py on the result."
            )
        layout = cls(config, family)
        if faults := layout._faults():
            raise ModelError(f"model.base: cannot be exported to GGUF: {'; '.join(faults)}.")
        return layout

    def _faults(self) -> list[str]:
        """Settings that llama.cpp would not follow."""
        rope, config = self.rope, self.config
        kind = rope["rope_type"]
        faults = []
        if config.hidden_act != self.family.activation:
            faults.append(f"hidden_act is {config.hidden_act}, and llama.cpp computes {self.family.activation}")
        if kind not in ("default", "linear", "llama3", "yarn"):
            faults.append(f"rope_type is {kind}, and llama.cpp has default, linear, llama3 and yarn")
        if kind == "yarn" and any(
            rope.get(key) is not None for key in ("attention_factor", "mscale", "mscale_all_dim")
        ):
            faults.append("its yarn scaling sets an attention factor, which llama.cpp works out by itself")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            faults.append("only a part of each head is rotated")
        return [*faults, *self.family.faults(config)]

    @property
    def name(self) -> str:
        """The architecture as a GGUF file spells it."""
        return self.family.gguf_name

    @property
    def rope(self) -> dict[str, Any]:
        return {"rope_type": "default", **self.config.rope_parameters}

    @property
    def head_channels(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def context_tokens(self) -> int:
        """The longest text; up to the sliding window where there is one, as llama.cpp attends to everything."""
        longest = self.config.max_position_embeddings
        slides = getattr(self.config, "use_sliding_window", True)
        return min(longest, (slides and getattr(self.config, "sliding_window", None)) or longest)

    def names(self, stored: Iterable[str]) -> dict[str, str]:
        """Names in the GGUF file by names in the checkpoint, for every tensor that is written.

        A tied head is left out, or becomes the embedding where the checkpoint has no other. Raises ModelError for a
        tensor that has no place, and for a place that is left without one.
        """
        kept = [name for name in stored if not COMPUTED.search(name)]
        if self.config.tie_word_embeddings and EMBEDDING in kept:
            kept = [name for name in kept if name != HEAD]
        places = self.family.places(kept, self.config.num_hidden_layers)
        if self.config.tie_word_embeddings and EMBEDDING not in kept and HEAD in kept:
            places[HEAD] = TOKEN_EMBEDDING
        if homeless := [name for name, place in places.items() if place is None]:
            raise ModelError(f"model.base: {', '.join(homeless[:8])}: no {self.name} of llama.cpp has such tensors.")
        named = {name: place for name, place in places.items() if place is not None}
        self._refuse_incomplete(set(named.values()))
        return named

    def _refuse_incomplete(self, places: set[str]) -> None:
        whole = {TOKEN_EMBEDDING, OUTPUT_NORM} | (set() if self.config.tie_word_embeddings else {OUTPUT})
        in_blocks = {place.partition(".")[2].partition(".")[2] for place in places if place.startswith("blk.")}
        blocks = {f"blk.{block}.{place}" for block in range(self.config.num_hidden_layers) for place in in_blocks}
        if missing := sorted((whole | blocks) - places):
            raise ModelError(f"model.base: the checkpoint has nothing for {', '.join(missing[:8])}.")

    def order(self, name: str, rows: int) -> torch.Tensor | None:
        """Which of the `rows` of the checkpoint's tensor `name` llama.cpp has where (rows,); None where they stay."""
        module = name.rpartition(".")[0].rpartition(".")[2]
        if module not in self.family.rearranged:
            return None
        heads = self.config.num_attention_heads if module == "q_proj" else self.config.num_key_value_heads
        # (H * D): channel i of the first half goes beside channel i of the second
        return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).flatten()

    def arranged(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, whose first dimension are the outputs of the checkpoint's tensor `name`, as llama.cpp wants it."""
        order = self.order(name, len(tensor))
        return tensor if order is None else tensor[order]

    def rope_factors(self) -> torch.Tensor | None:
        """What Llama 3's scaling divides each of the D/2 frequencies by; None where there is nothing to divide."""
        if self.rope["rope_type"] != "llama3":
            return None
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        channels = torch.arange(0, self.head_channels, 2, dtype=torch.float32)
        return self.rope["rope_theta"] ** -(channels / self.head_channels) / scaled

    def describe(self, writer: GGUFWriter, rows: int) -> None:
        """Everything the file says of the architecture, for an embedding of `rows`."""
        config = self.config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(self.context_tokens)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_channels)
        writer.add_value_length(self.head_channels)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(rows)
        writer.add_rope_dimension_count(self.head_channels)
        writer.add_rope_freq_base(self.rope["rope_theta"])
        if self.rope["rope_type"] in ("linear", "yarn"):
            self._describe_scaling(writer)
        self.family.describe(writer, config)

    def _describe_scaling(self, writer: GGUFWriter) -> None:
        rope = self.rope
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            original = rope.get("original_max_position_embeddings") or self.config.max_position_embeddings
            writer.add_rope_scaling_orig_ctx_len(original)
            writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
            writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
