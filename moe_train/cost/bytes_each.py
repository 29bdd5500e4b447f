"""What training memory comes to for each parameter and each token, beside BF16 with FP32 moments.

Where a run's memory goes does not depend on how many tokens it takes at once, but for two figures: what is held of
every parameter, and what is kept of every token until its backward pass. FP8 and BF16 moments change these.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moe_train.config import ModelConfig, OptimizerConfig
from moe_train.cost.flops import parameter_counts
from moe_train.cost.fp8_operands import Fp8Kept
from moe_train.cost.kernels import Kernels
from moe_train.cost.memory import training_memory
from moe_train.cost.tape import ACTIVATIONS, COPIES, GRADIENTS, STATES, WEIGHTS


def compared(
    model: ModelConfig,
    vocab_size: int,
    tokens: int,
    optimizer: OptimizerConfig,
    *,
    precision: str,
    compute_dtype: str,
    fp8: Fp8Kept | None,
    activation_checkpointing: bool,
    kernels: Kernels,
) -> list[dict[str, Any]]:
    """Two rows: as composed, and the same model, optimizer and checkpointing in BF16 with FP32 moments.

    `settings` says which; `per_parameter` has the bytes of `weights` (routing biases among them), `gradients`,
    `optimizer_states`, and `weight_copies` (forms of the weights that products read, at their most), each over all
    parameters, and their sum `together`; `activations_per_token` is over the `tokens` a device holds at once.
    """
    plain = dataclasses.replace(optimizer, moments="float32", stochastic_rounding=False)
    products = f"{precision}, {compute_dtype}" if fp8 is not None else compute_dtype
    rows = []
    for products_in, of, compute, in_fp8 in (
        (products, optimizer, compute_dtype, fp8),
        ("bfloat16", plain, "bfloat16", None),
    ):
        parts = training_memory(
            model,
            vocab_size,
            tokens,
            of,
            compute_bytes=2 if compute == "bfloat16" else 4,
            activation_checkpointing=activation_checkpointing,
            kernels=kernels,
            fp8=in_fp8,
        )
        parameters = parameter_counts(model, vocab_size).total
        each = {part: parts[part] / parameters for part in (WEIGHTS, GRADIENTS, STATES, COPIES)}
        rows.append(
            {
                "settings": f"{products_in}; {of.kind}, moments {of.moments}",
                "per_parameter": each | {"together": sum(each.values())},
                "activations_per_token": parts[ACTIVATIONS] / tokens,
            }
        )
    return rows
