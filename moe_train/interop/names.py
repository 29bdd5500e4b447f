"""Which tensor on disk is which part of one of ours: one map, read in both directions.

transformers keeps gate and up projections apart and every expert by itself; ours are fused and stacked. Each of its
tensors is a `Place` in one of ours, so that export cuts and import fills. The rotary features of MLA lie in pairs there
(feature 2i is turned against 2i + 1) and in halves here (i against i + r/2), so rows of the projections change places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_train.config import MLAConfig, ModelConfig, MoEConfig

Part = tuple[int | slice, ...]
WHOLE: Part = (slice(None),)


class Place(NamedTuple):
    """The part of our tensor that one of theirs is: theirs = ours[part][rows]."""

    theirs: str
    part: Part = WHOLE
    rows: Tensor | None = None  # int64; None: in our order

    def cut(self, ours: Tensor) -> Tensor:
        """Their tensor: a view of ours where no rows change places."""
        mine = ours[self.part]
        return mine if self.rows is None else mine[self.rows]

    def fill(self, ours: Tensor, theirs: Tensor) -> None:
        mine = ours[self.part]
        if self.rows is None:
            mine.copy_(theirs)
        else:
            mine[self.rows] = theirs.to(mine.dtype)


@dataclass(frozen=True)
class Names:
    """What differs between families in how weights are called and laid out."""

    moe: str = "mlp"  # the module that holds router and experts
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    selection_bias: bool = False  # whether there is a place for the router's
    shared_experts: bool = False  # whether such a module exists; without shared experts it is there with width 0
    interleaved_rope: bool = False


def places(model: ModelConfig, names: Names) -> dict[str, list[Place]]:
    """Where each tensor of our Transformer's state is in theirs; [] where they have none.

    MTP modules are the layers after the last, as DeepSeek-V3 was published; transformers has no other name for them.
    """
    found = {
        "embedding.weight": [Place("model.embed_tokens.weight")],
        "norm.weight": [Place("model.norm.weight")],
    }
    if not model.tie_word_embeddings:
        found["lm_head.weight"] = [Place("lm_head.weight")]
    for layer in range(model.num_hidden_layers):
        found |= _block(model, names, layer, f"blocks.{layer}")
    for depth in range(model.mtp_depth):
        layer = model.num_hidden_layers + depth
        for part, theirs in _MTP_PARTS.items():
            found[f"mtp.{depth}.{part}.weight"] = [Place(f"model.layers.{layer}.{theirs}.weight")]
        found |= _block(model, names, layer, f"mtp.{depth}.block")
    return found


_MTP_PARTS = {
    "embedding_norm": "enorm",
    "hidden_norm": "hnorm",
    "join_proj": "eh_proj",
    "norm": "shared_head.norm",
}


def mtp_copies(model: ModelConfig) -> dict[str, str]:
    """The tensors that each MTP module has once more on disk, and which of ours they are copies of."""
    head = "embedding.weight" if model.tie_word_embeddings else "lm_head.weight"
    copies = {}
    for layer in range(model.num_hidden_layers, model.num_hidden_layers + model.mtp_depth):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = "embedding.weight"
        copies[f"model.layers.{layer}.shared_head.head.weight"] = head
    return copies


def _block(model: ModelConfig, names: Names, layer: int, ours: str) -> dict[str, list[Place]]:
    theirs = f"model.layers.{layer}"
    found = {
        f"{ours}.input_norm.weight": [Place(f"{theirs}.input_layernorm.weight")],
        f"{ours}.post_attention_norm.weight": [Place(f"{theirs}.post_attention_layernorm.weight")],
    }
    found |= _attention(model, names, f"{ours}.attention", f"{theirs}.self_attn")
    if model.moe is not None and model.is_moe_layer(layer):
        return found | _experts(model.moe, names, f"{ours}.ffn", f"{theirs}.{names.moe}")
    return found | _swiglu(model.intermediate_size, f"{ours}.ffn", f"{theirs}.mlp")


def empty_tensors(model: ModelConfig, names: Names) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes of the tensors of width 0 that stand for shared experts where there are none."""
    if model.moe is None or model.moe.num_shared_experts or not names.shared_experts:
        return
    for layer in range(model.moe.first_k_dense_replace, model.num_hidden_layers + model.mtp_depth):
        module = f"model.layers.{layer}.{names.moe}.shared_experts"
        yield f"{module}.gate_proj.weight", (0, model.hidden_size)
        yield f"{module}.up_proj.weight", (0, model.hidden_size)
        yield f"{module}.down_proj.weight", (model.hidden_size, 0)


def _attention(model: ModelConfig, names: Names, ours: str, theirs: str) -> dict[str, list[Place]]:
    attention = model.attention
    if not isinstance(attention, MLAConfig):
        tensors = ["q_proj", "k_proj", "v_proj", "o_proj", *(["q_norm", "k_norm"] if attention.qk_norm else [])]
        return {f"{ours}.{name}.weight": [Place(f"{theirs}.{name}.weight")] for name in tensors}
    query_rows = key_rows = None
    if names.interleaved_rope:
        query_rows = _in_pairs(
            attention.num_attention_heads, kept=attention.qk_nope_head_dim, turned=attention.qk_rope_head_dim
        )
        key_rows = _in_pairs(1, kept=attention.kv_lora_rank, turned=attention.qk_rope_head_dim)
    found = {
        f"{ours}.kv_a_proj.weight": [Place(f"{theirs}.kv_a_proj_with_mqa.weight", rows=key_rows)],
        f"{ours}.kv_a_norm.weight": [Place(f"{theirs}.kv_a_layernorm.weight")],
        f"{ours}.kv_b_proj.weight": [Place(f"{theirs}.kv_b_proj.weight")],
        f"{ours}.o_proj.weight": [Place(f"{theirs}.o_proj.weight")],
    }
    if attention.q_lora_rank is None:
        found[f"{ours}.q_proj.weight"] = [Place(f"{theirs}.q_proj.weight", rows=query_rows)]
    else:
        found[f"{ours}.q_a_proj.weight"] = [Place(f"{theirs}.q_a_proj.weight")]
        found[f"{ours}.q_a_norm.weight"] = [Place(f"{theirs}.q_a_layernorm.weight")]
        found[f"{ours}.q_b_proj.weight"] = [Place(f"{theirs}.q_b_proj.weight", rows=query_rows)]
    return found


def _in_pairs(heads: int, *, kept: int, turned: int) -> Tensor:
    """Rows of ours in the order of theirs: in each head the first `kept` as they are, the rotary ones by pairs."""
    rows_hc = torch.arange(heads * (kept + turned)).view(heads, kept + turned)
    pairs_hc = rows_hc[:, kept:].unflatten(1, (2, turned // 2)).transpose(1, 2).flatten(1)
    return torch.cat((rows_hc[:, :kept], pairs_hc), dim=1).flatten()


def _swiglu(width: int, ours: str, theirs: str) -> dict[str, list[Place]]:
    return {
        f"{ours}.gate_up_proj.weight": [
            Place(f"{theirs}.gate_proj.weight", (slice(0, width),)),
            Place(f"{theirs}.up_proj.weight", (slice(width, 2 * width),)),
        ],
        f"{ours}.down_proj.weight": [Place(f"{theirs}.down_proj.weight")],
    }


def _experts(moe: MoEConfig, names: Names, ours: str, theirs: str) -> dict[str, list[Place]]:
    gate, up, down = names.expert
    width = moe.moe_intermediate_size
    gate_up, downs = [], []
    for expert in range(moe.num_experts):
        module = f"{theirs}.experts.{expert}"
        gate_up.append(Place(f"{module}.{gate}.weight", (expert, slice(0, width))))
        gate_up.append(Place(f"{module}.{up}.weight", (expert, slice(width, 2 * width))))
        downs.append(Place(f"{module}.{down}.weight", (expert,)))
    found = {
        f"{ours}.router.weight": [Place(f"{theirs}.gate.weight")],
        f"{ours}.router.selection_bias": (
            [Place(f"{theirs}.gate.e_score_correction_bias")] if names.selection_bias else []
        ),
        f"{ours}.experts.gate_up_proj": gate_up,
        f"{ours}.experts.down_proj": downs,
    }
    if moe.num_shared_experts:
        shared_width = moe.num_shared_experts * width
        found |= _swiglu(shared_width, f"{ours}.shared_experts", f"{theirs}.shared_experts")
    return found
