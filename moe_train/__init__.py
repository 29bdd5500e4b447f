"""moe_train: measure what DeepSeek's training techniques save, while training a real MoE language model."""

__version__ = "0.1.0"
