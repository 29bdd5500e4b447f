"""What an architecture of transformers can express, and its configuration in both directions.

A `Family` says which attention, router and layers it has; from that follow whether a model fits, its configuration, and
the settings of `configs/model/` that its configuration stands for. What it cannot express is refused by name, never
approximated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from moe_train.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from moe_train.errors import UserError
from moe_train.interop import rope_parameters
from moe_train.interop.names import Names

MLA_NORM_EPS = 1e-6  # of the norms inside transformers' MLA, whatever rms_norm_eps says


@dataclass(frozen=True)
class Family:
    """One architecture. `moe`: whether its layers can, must or cannot have experts."""

    model_type: str
    architecture: str
    attention: Literal["mla", "gqa"]
    moe: Literal["can", "must", "cannot"]
    names: Names
    qk_norm: tuple[str | None, ...] = (None,)
    scoring_func: Literal["sigmoid", "softmax"] | None = None
    groups: int | None = None  # how many of a group's best experts make its score; None: there are no groups
    norm_topk_prob: bool | None = None  # None: either
    routed_scaling_factor: bool = False  # whether there is such a key
    dense_layers: Literal["first_k_dense_replace", "mlp_only_layers"] | None = None
    experts_key: str = "n_routed_experts"
    expert_width_key: str = "moe_intermediate_size"
    heads_fill_hidden: bool = False  # head_dim is hidden_size / num_attention_heads
    heads_divide_hidden: bool = False  # their configuration insists, though nothing rests on it
    mtp: bool = False  # whether MTP modules are published with it, as mixtures behind the last layer

    # ------------------------------------------------------------------------------------------- what has no place

    def obstacles(self, model: ModelConfig, *, biased: bool) -> Iterator[str]:
        """The settings of `model` that this family cannot express. `biased`: some selection bias is not zero."""
        attention = model.attention
        if attention.kind != self.attention:
            yield f"model.attention.kind={attention.kind}"
        elif isinstance(attention, MLAConfig) and model.rms_norm_eps != MLA_NORM_EPS:
            yield f"model.rms_norm_eps={model.rms_norm_eps} (its MLA has {MLA_NORM_EPS} fixed)"
        elif isinstance(attention, GQAConfig):
            if attention.qk_norm not in self.qk_norm:
                yield f"model.attention.qk_norm={attention.qk_norm or 'null'}"
            if self.heads_fill_hidden and attention.head_dim * attention.num_attention_heads != model.hidden_size:
                yield f"model.attention.head_dim={attention.head_dim} (it has hidden_size / num_attention_heads)"
        if self.heads_divide_hidden and model.hidden_size % attention.num_attention_heads:
            yield (
                f"model.attention.num_attention_heads={attention.num_attention_heads} "
                f"(it must divide hidden_size={model.hidden_size})"
            )
        if model.moe is None:
            if self.moe == "must":
                yield "model.moe=null"
        elif self.moe == "cannot":
            yield f"model.moe.num_experts={model.moe.num_experts}"
        else:
            yield from self._moe_obstacles(model.moe, biased)
        if model.mtp is not None and not self.mtp:
            yield f"model.mtp.depth={model.mtp.depth} (mtp=drop leaves it out)"
        elif model.mtp is not None and model.moe is None:
            yield "model.mtp with model.moe=null (its MTP modules have experts; mtp=drop leaves them out)"

    def _moe_obstacles(self, moe: MoEConfig, biased: bool) -> Iterator[str]:
        if moe.scoring_func != self.scoring_func:
            yield f"model.moe.scoring_func={moe.scoring_func}"
        if biased and not self.names.selection_bias:
            yield f"a selection bias (model.moe.bias_update_speed={moe.bias_update_speed})"
        if moe.topk_group < moe.n_group:
            if self.groups is None:
                yield f"model.moe.n_group={moe.n_group}"
            elif moe.group_score_top_k != self.groups:
                yield f"model.moe.group_score_top_k={moe.group_score_top_k} (it has {self.groups})"
        if self.groups is not None and moe.num_experts < self.groups:
            yield f"model.moe.num_experts={moe.num_experts} (a group needs {self.groups})"
        if moe.num_shared_experts and not self.names.shared_experts:
            yield f"model.moe.num_shared_experts={moe.num_shared_experts}"
        if moe.first_k_dense_replace and self.dense_layers is None:
            yield f"model.moe.first_k_dense_replace={moe.first_k_dense_replace}"
        if self.norm_topk_prob is not None and moe.norm_topk_prob != self.norm_topk_prob:
            yield f"model.moe.norm_topk_prob={str(moe.norm_topk_prob).lower()}"
        if moe.routed_scaling_factor != 1 and not self.routed_scaling_factor:
            yield f"model.moe.routed_scaling_factor={moe.routed_scaling_factor}"

    # ------------------------------------------------------------------------------------------------ from ours

    def to_config(
        self, model: ModelConfig, vocab_size: int, sequence_length: int, eos_id: int | None, bos_id: int | None = None
    ) -> dict[str, Any]:
        """config.json of a model that has no obstacles, but for its dtype."""
        attention = model.attention
        config: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": vocab_size,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.intermediate_size,
            "num_hidden_layers": model.num_hidden_layers,
            "num_attention_heads": attention.num_attention_heads,
            "hidden_act": "silu",
            "max_position_embeddings": sequence_length,
            "initializer_range": model.initializer_range,
            "rms_norm_eps": model.rms_norm_eps,
            "tie_word_embeddings": model.tie_word_embeddings,
            "rope_parameters": rope_parameters.to_theirs(model),
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": bos_id,  # the families' own defaults would be tokens of other vocabularies
            "eos_token_id": eos_id,
            "pad_token_id": None,
        }
        if isinstance(attention, MLAConfig):
            keys = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
            config |= {key: getattr(attention, key) for key in keys}
            config["num_key_value_heads"] = attention.num_attention_heads
        else:
            config["num_key_value_heads"] = attention.num_key_value_heads
            config["head_dim"] = attention.head_dim
        if self.moe != "cannot":
            config |= self._moe_config(model)
        if self.mtp:
            config["num_nextn_predict_layers"] = model.mtp_depth  # their default of 1 promises a module
        if self.model_type == "deepseek_v3":
            config["rope_interleave"] = True
        if self.model_type == "glm4_moe":
            config["use_qk_norm"] = isinstance(attention, GQAConfig) and attention.qk_norm == "per_head"
            config["rope_parameters"]["partial_rotary_factor"] = 1.0  # theirs turns half of each head by default
        return config

    def _moe_config(self, model: ModelConfig) -> dict[str, Any]:
        moe = model.moe
        if moe is None:  # every layer among the first dense ones
            return {"first_k_dense_replace": model.num_hidden_layers}
        config: dict[str, Any] = {
            self.experts_key: moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            self.expert_width_key: moe.moe_intermediate_size,
            "norm_topk_prob": moe.norm_topk_prob,
        }
        if self.names.shared_experts:
            config["n_shared_experts"] = moe.num_shared_experts
        if self.routed_scaling_factor:
            config["routed_scaling_factor"] = moe.routed_scaling_factor
        if self.dense_layers == "first_k_dense_replace":
            config["first_k_dense_replace"] = moe.first_k_dense_replace
        elif self.dense_layers == "mlp_only_layers":
            config |= {"mlp_only_layers": list(range(moe.first_k_dense_replace)), "decoder_sparse_step": 1}
        if self.groups is not None:
            # All groups open is no groups; theirs would still want a group's best experts for its score.
            limited = moe.topk_group < moe.n_group
            config |= {"n_group": moe.n_group if limited else 1, "topk_group": moe.topk_group if limited else 1}
            if self.model_type == "deepseek_v2":
                config["topk_method"] = "group_limited_greedy" if limited else "greedy"
        if self.scoring_func == "softmax" and self.model_type != "deepseek_v2":
            config["router_aux_loss_coef"] = moe.batch_loss_weight
        return config

    # ------------------------------------------------------------------------------------------------- to ours

    def to_settings(self, theirs: dict[str, Any], name: str, where: str) -> dict[str, Any]:
        """The settings of configs/model/ that a configuration stands for. Raises UserError for what has no place.

        Without MTP: whether its modules are there, the weights say.
        """
        self._check_importable(theirs, where)
        mla = self.attention == "mla"
        return {
            "name": name,
            "vocab_size": theirs["vocab_size"],
            "hidden_size": theirs["hidden_size"],
            "num_hidden_layers": theirs["num_hidden_layers"],
            "intermediate_size": theirs["intermediate_size"],
            "attention": self._attention_settings(theirs),
            "rope_theta": float(theirs["rope_parameters"]["rope_theta"]),
            "rope_scaling": rope_parameters.to_settings(theirs["rope_parameters"], mla=mla, where=where),
            "moe": self._moe_settings(theirs, where),
            "mtp": None,
            "dense_twin_of_moe": None,
            "tie_word_embeddings": bool(theirs["tie_word_embeddings"]),
            "rms_norm_eps": float(theirs["rms_norm_eps"]),
            "initializer_range": float(theirs["initializer_range"]),
            "dropout": 0.0,
        }

    def _check_importable(self, theirs: dict[str, Any], where: str) -> None:
        def refuse_unless(condition: bool, key: str) -> None:
            if not condition:
                raise UserError(f"{where}: {key}={theirs.get(key)} has no place here: choose a model without it")

        refuse_unless(theirs.get("hidden_act") == "silu", "hidden_act")
        refuse_unless(not theirs.get("attention_bias"), "attention_bias")
        refuse_unless(not theirs.get("mlp_bias"), "mlp_bias")
        refuse_unless(theirs.get("clip_qkv") is None, "clip_qkv")
        refuse_unless(
            theirs.get("use_sliding_window") is not None or not theirs.get("sliding_window"), "sliding_window"
        )
        refuse_unless(not theirs.get("use_sliding_window"), "use_sliding_window")
        refuse_unless(theirs.get("decoder_sparse_step") in (None, 1), "decoder_sparse_step")
        refuse_unless(theirs.get("moe_layer_freq") in (None, 1), "moe_layer_freq")
        refuse_unless(theirs.get("scoring_func") in (None, self.scoring_func), "scoring_func")
        methods = {"sigmoid": (None, "noaux_tc"), "softmax": (None, "greedy", "group_limited_greedy")}
        refuse_unless(theirs.get("topk_method") in methods.get(self.scoring_func or "", (None,)), "topk_method")
        if self.norm_topk_prob is not None and theirs.get("norm_topk_prob") is not None:
            refuse_unless(theirs["norm_topk_prob"] == self.norm_topk_prob, "norm_topk_prob")
        if self.attention == "mla":
            refuse_unless(theirs["rms_norm_eps"] == MLA_NORM_EPS, "rms_norm_eps")
            refuse_unless(theirs["num_key_value_heads"] == theirs["num_attention_heads"], "num_key_value_heads")

    def _attention_settings(self, theirs: dict[str, Any]) -> dict[str, Any]:
        if self.attention == "mla":
            keys = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
            return {
                "kind": "mla",
                "num_attention_heads": theirs["num_attention_heads"],
                **{key: theirs[key] for key in keys},
            }
        qk_norm = self.qk_norm[-1] if theirs.get("use_qk_norm", True) else None
        return {
            "kind": "gqa",
            "num_attention_heads": theirs["num_attention_heads"],
            "num_key_value_heads": theirs["num_key_value_heads"],
            "head_dim": theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"],
            "qk_norm": qk_norm,
        }

    def _moe_settings(self, theirs: dict[str, Any], where: str) -> dict[str, Any] | None:
        """Routing as it is there; balancing, of which a configuration says little, as the family was trained."""
        dense = self._dense_layers(theirs, where)
        if self.moe == "cannot" or dense >= theirs["num_hidden_layers"]:
            return None
        sigmoid = self.scoring_func == "sigmoid"
        groups = 1 if theirs.get("n_group") is None else theirs["n_group"]
        open_groups = groups if theirs.get("topk_group") is None else theirs["topk_group"]
        limited = self.groups is not None and theirs.get("topk_method") != "greedy"
        return {
            "num_experts": theirs[self.experts_key],
            "top_k": theirs["num_experts_per_tok"],
            "num_shared_experts": (theirs.get("n_shared_experts") or 0) if self.names.shared_experts else 0,
            "moe_intermediate_size": theirs[self.expert_width_key],
            "first_k_dense_replace": dense,
            "routing": "token_choice",
            "scoring_func": self.scoring_func,
            "n_group": groups if limited else 1,
            "topk_group": open_groups if limited else 1,
            "group_score_top_k": self.groups or 1,
            "norm_topk_prob": bool(theirs["norm_topk_prob"]) if self.norm_topk_prob is None else self.norm_topk_prob,
            "routed_scaling_factor": float(theirs["routed_scaling_factor"]) if self.routed_scaling_factor else 1.0,
            "capacity_factor": None,
            "bias_update_speed": 0.001 if sigmoid else 0.0,
            "bias_update_fraction": 1.0,
            "sequence_loss_weight": 1e-4 if sigmoid else 0.0,
            "batch_loss_weight": 0.0 if sigmoid else float(theirs.get("router_aux_loss_coef") or 0.0),
            "router_z_loss_weight": 0.0,
        }

    def _dense_layers(self, theirs: dict[str, Any], where: str) -> int:
        if self.dense_layers == "first_k_dense_replace":
            return int(theirs["first_k_dense_replace"])
        layers = theirs.get("mlp_only_layers") or []
        if sorted(layers) != list(range(len(layers))):
            raise UserError(f"{where}: mlp_only_layers={layers} has no place here: only the first layers can be dense")
        return len(layers)

    def names_of(self, theirs: dict[str, Any]) -> Names:
        """`names` as a configuration may change them."""
        if theirs.get("rope_interleave") is False:
            return dataclasses.replace(self.names, interleaved_rope=False)
        return self.names
