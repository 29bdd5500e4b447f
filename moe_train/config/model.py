"""The shape of a transformer: attention, rotary scaling, experts and their routing, multi-token prediction.

Names are those of Hugging Face's configurations where these have one. What is built from it is `ModelConfig.resolved`.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from moe_train.config.fields import STRICT, Count, Fraction, NonNegative, Positive, PositiveFloat, Size, require

# ------------------------------------------------------------------------------------------------------ attention


@dataclass(frozen=True, config=STRICT)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    kind: Literal["mla"]
    num_attention_heads: Positive
    kv_lora_rank: Positive
    q_lora_rank: Positive | None  # None: queries are not compressed
    qk_nope_head_dim: Positive
    qk_rope_head_dim: Positive
    v_head_dim: Positive

    def __post_init__(self) -> None:
        require(
            self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: RoPE turns pairs"
        )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True, config=STRICT)
class GQAConfig:
    """Grouped-query attention (arXiv 2305.13245): all heads have keys and values of their own in multi-head attention,
    one pair serves them all in multi-query attention (arXiv 1911.02150)."""

    kind: Literal["gqa"]
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive
    # RMSNorm of queries and keys before RoPE: of each head with one weight (Qwen3, arXiv 2505.09388), or of all heads
    # as one vector (OLMoE, arXiv 2409.02060).
    qk_norm: Literal["per_head", "all_heads"] | None

    def __post_init__(self) -> None:
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: RoPE turns pairs")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_key_value_heads={self.num_key_value_heads} does not divide "
            f"num_attention_heads={self.num_attention_heads}: choose a divisor",
        )


AttentionConfig = Annotated[MLAConfig | GQAConfig, Field(discriminator="kind")]


@dataclass(frozen=True, config=STRICT)
class YarnConfig:
    """YaRN (arXiv 2309.00071): slow rotary frequencies are divided by `factor`, fast ones kept, a ramp between.

    beta_fast and beta_slow: features that turn more or fewer times than this over the original length. The softmax
    scale is multiplied by (0.1 · mscale · ln factor + 1)²; mscale=1 is the paper's, 0 leaves it alone.
    """

    kind: Literal["yarn"]
    factor: Annotated[float, Field(ge=1, le=1e6)]
    original_max_position_embeddings: Positive
    beta_fast: PositiveFloat
    beta_slow: PositiveFloat
    mscale: NonNegative

    def __post_init__(self) -> None:
        require(
            self.beta_slow < self.beta_fast,
            f"beta_slow={self.beta_slow} must be below beta_fast={self.beta_fast}: the ramp runs between them",
        )


@dataclass(frozen=True, config=STRICT)
class Llama3RopeConfig:
    """Llama 3.1's frequency scaling (arXiv 2407.21783): long wavelengths times `factor`, short ones kept."""

    kind: Literal["llama3"]
    factor: Annotated[float, Field(ge=1, le=1e6)]
    original_max_position_embeddings: Positive
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat

    def __post_init__(self) -> None:
        require(
            self.low_freq_factor < self.high_freq_factor,
            f"low_freq_factor={self.low_freq_factor} must be below high_freq_factor={self.high_freq_factor}",
        )


RopeScalingConfig = Annotated[YarnConfig | Llama3RopeConfig, Field(discriminator="kind")]


# -------------------------------------------------------------------------------------------------------- experts


@dataclass(frozen=True, config=STRICT)
class MoEConfig:
    """Fine-grained routed experts beside shared ones (DeepSeekMoE, arXiv 2401.06066), and how tokens are shared out.

    The switches make the published routers: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2), Switch (2101.03961), GShard
    (2006.16668), expert choice (2202.09368), OLMoE (2409.02060); configs/model/moe has each by name.
    """

    num_experts: Size  # routed experts
    top_k: Size  # routed experts a token visits; of expert_choice on average, times capacity_factor
    num_shared_experts: Count  # experts every token visits
    moe_intermediate_size: Size  # width of one expert
    first_k_dense_replace: Count  # the first layers keep a dense FFN
    routing: Literal["token_choice", "expert_choice"]  # expert_choice looks at the whole batch, later tokens too
    scoring_func: Literal["sigmoid", "softmax"]
    n_group: Size  # groups the experts are cut into
    topk_group: Size  # groups a token may visit
    group_score_top_k: Size  # a group's score: the sum of its highest ones (2 in DeepSeek-V3, 1 in V2)
    norm_topk_prob: bool  # chosen gate values are scaled to sum 1
    routed_scaling_factor: PositiveFloat
    # Places an expert has, as a multiple of its even share; what does not fit is dropped, in training only.
    # None: dropless.
    capacity_factor: PositiveFloat | None
    bias_update_speed: NonNegative  # u (gamma in V3): the selection bias moves by this much a step; 0 turns it off
    bias_update_fraction: Fraction  # of the run, after which the bias rests
    sequence_loss_weight: NonNegative  # alpha of the sequence-wise balance loss; 0 turns it off
    batch_loss_weight: NonNegative  # alpha of the batch-wise balance loss (Switch, GShard), over all ranks
    router_z_loss_weight: NonNegative  # of the squared log-sum-exp of the router's logits (ST-MoE, arXiv 2202.08906)

    def __post_init__(self) -> None:
        require(
            self.top_k <= self.num_experts,
            f"top_k={self.top_k} is more than num_experts={self.num_experts}: lower top_k or raise num_experts",
        )
        require(
            self.num_experts % self.n_group == 0,
            f"n_group={self.n_group} does not divide num_experts={self.num_experts}: choose a divisor",
        )
        group = self.num_experts // self.n_group
        require(
            self.topk_group <= self.n_group,
            f"topk_group={self.topk_group} is more than n_group={self.n_group}: lower it",
        )
        require(
            self.top_k <= self.topk_group * group,
            f"top_k={self.top_k} is more than the {self.topk_group * group} experts of topk_group={self.topk_group} "
            f"groups of {group}: raise topk_group",
        )
        require(
            self.n_group == 1 or self.group_score_top_k <= group,
            f"group_score_top_k={self.group_score_top_k} is more than a group's {group} experts: lower it",
        )
        if self.routing == "expert_choice":
            self._check_expert_choice()

    @property
    def experts_per_token(self) -> float:
        """Routed experts a token visits on average; where capacity can drop it, at most."""
        if self.capacity_factor is None:
            return self.top_k
        factor = self.capacity_factor if self.routing == "expert_choice" else min(1.0, self.capacity_factor)
        return min(factor * self.top_k, self.num_experts)

    def _check_expert_choice(self) -> None:
        require(
            self.capacity_factor is not None,
            "routing=expert_choice needs capacity_factor: how many tokens an expert takes, as a multiple of "
            "top_k/num_experts of them; give capacity_factor=1.0",
        )
        idle = {
            "n_group": self.n_group != 1,
            "norm_topk_prob": self.norm_topk_prob,
            "bias_update_speed": self.bias_update_speed != 0,
            "sequence_loss_weight": self.sequence_loss_weight != 0,
            "batch_loss_weight": self.batch_loss_weight != 0,
        }
        for key, given in idle.items():
            require(
                not given,
                f"{key} does nothing with routing=expert_choice, where every expert has the same load: "
                "take model/moe=expert_choice, which turns it off",
            )


@dataclass(frozen=True, config=STRICT)
class MTPConfig:
    """Multi-token prediction (DeepSeek-V3, section 2.2): `depth` modules, one after the other, each one token further.

    Their mean loss times a weight joins the objective: loss_weight until `late_from` of the run (a fraction),
    late_loss_weight after it (0.3 for 10T of 14.8T tokens, then 0.1, in DeepSeek-V3).
    """

    depth: Annotated[int, Field(ge=1, le=16)]
    loss_weight: NonNegative
    late_loss_weight: NonNegative
    late_from: Fraction

    def weight_at(self, progress: float) -> float:
        """λ at a run's progress, 0 to 1."""
        return self.loss_weight if progress < self.late_from else self.late_loss_weight


# ---------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Shape of a transformer. With `dense_twin_of_moe` it stands for a dense model of equal cost."""

    name: str
    vocab_size: Positive | None  # None: taken from the tokenizer, rounded up to a multiple of 64
    hidden_size: Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=10_000)]
    intermediate_size: Size  # width of the dense FFNs
    attention: AttentionConfig
    rope_theta: PositiveFloat
    rope_scaling: RopeScalingConfig | None
    moe: MoEConfig | None  # None: every FFN is dense
    mtp: MTPConfig | None
    # The dense model of equal FLOPs a token, or of equal parameters, stands in for the MoE one; its width is computed.
    dense_twin_of_moe: Literal["equal_flops", "equal_params"] | None
    tie_word_embeddings: bool
    rms_norm_eps: PositiveFloat
    initializer_range: PositiveFloat
    dropout: Annotated[float, Field(ge=0, lt=1)]

    def __post_init__(self) -> None:
        if self.moe is None:
            require(
                self.dense_twin_of_moe is None,
                f"dense_twin_of_moe={self.dense_twin_of_moe} needs moe settings to be the twin of: give moe.*",
            )
            return
        require(
            self.moe.first_k_dense_replace < self.num_hidden_layers,
            f"moe.first_k_dense_replace={self.moe.first_k_dense_replace} leaves no MoE layer among "
            f"num_hidden_layers={self.num_hidden_layers}: lower it, or set model.moe=null for a dense model",
        )
        require(
            self.dense_twin_of_moe is None or self._twin_width(self.moe) <= 10**6,
            f"dense_twin_of_moe={self.dense_twin_of_moe} makes FFNs wider than a million: lower moe.num_experts",
        )

    @property
    def mtp_depth(self) -> int:
        return 0 if self.mtp is None else self.mtp.depth

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the main model, without those of MTP modules."""
        return 0 if self.moe is None else self.num_hidden_layers - self.moe.first_k_dense_replace

    @property
    def num_routers(self) -> int:
        """MoE layers in all: an MTP module's block is like the main model's last."""
        return 0 if self.moe is None else self.num_moe_layers + self.mtp_depth

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and layer >= self.moe.first_k_dense_replace

    def resolved(self) -> ModelConfig:
        """The model that is really built: a twin becomes a plain dense model whose FFN width gives equal cost.

        A SwiGLU of width w costs 3·hidden·w multiply-adds a token, as many as it has weights, and the router
        hidden·num_experts. So per MoE layer the width of equal FLOPs is (experts_per_token +
        num_shared_experts) · moe_intermediate_size + num_experts/3; that of equal parameters has all num_experts. It is
        averaged over all layers and rounded to a multiple of 8 (16 bytes in BF16, what FP8 matmuls want).
        """
        if self.dense_twin_of_moe is None or self.moe is None:
            return self
        return dataclasses.replace(self, moe=None, dense_twin_of_moe=None, intermediate_size=self._twin_width(self.moe))

    def _twin_width(self, moe: MoEConfig) -> int:
        routed = moe.experts_per_token if self.dense_twin_of_moe == "equal_flops" else moe.num_experts
        width_of_moe = (routed + moe.num_shared_experts) * moe.moe_intermediate_size + moe.num_experts / 3
        total = moe.first_k_dense_replace * self.intermediate_size + self.num_routers * width_of_moe
        return max(8, 8 * round(total / (self.num_hidden_layers + self.mtp_depth) / 8))
