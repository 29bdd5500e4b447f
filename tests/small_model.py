"""Models small enough for tests: settings that make `model=nano` so, and a mixture for tests of single parts."""

from moe_train.config import MoEConfig

# Three layers of width 32, eight experts.
SMALL = [
    "model.hidden_size=32",
    "model.num_hidden_layers=3",
    "model.intermediate_size=48",
    "model.attention.num_attention_heads=2",
    "model.attention.kv_lora_rank=16",
    "model.attention.qk_nope_head_dim=8",
    "model.attention.qk_rope_head_dim=8",
    "model.attention.v_head_dim=16",
    "model.moe.num_experts=8",
    "model.moe.top_k=2",
    "model.moe.moe_intermediate_size=16",
]

MOE = MoEConfig(
    num_experts=8,
    top_k=2,
    num_shared_experts=1,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    routing="token_choice",
    scoring_func="sigmoid",
    n_group=1,
    topk_group=1,
    group_score_top_k=2,
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
    capacity_factor=None,
    bias_update_speed=0.001,
    bias_update_fraction=1.0,
    sequence_loss_weight=0.0001,
    batch_loss_weight=0.0,
    router_z_loss_weight=0.0,
)
