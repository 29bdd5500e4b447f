"""The settings that make `model=nano` small enough for tests: three layers of width 32, eight experts."""

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
