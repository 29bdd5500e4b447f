"""What can be asked for: suites by name and the settings they take. Without torch, so that a slip costs a second."""

from __future__ import annotations

from moe_train.errors import UsageError

SUITES = ("step", "peer", "tax", "kernels", "experts", "precision", "startup", "smoke")

# The groups and keys of configs/train.yaml that a benchmark takes: those that change what a step does.
KEYS = (
    *("model", "optimizer", "precision", "data", "schedule"),
    *("batch_size", "micro_batch_size", "num_threads", "cpu_kernels", "z_loss_weight", "activation_checkpointing"),
    *("seed", "deterministic"),
)


def chosen(text: str) -> list[str]:
    """The suites of `suite=a,b` or `suite=all`, which is all but the short one. Raises UsageError."""
    if text == "all":
        return [name for name in SUITES if name != "smoke"]
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in SUITES:
            raise UsageError(f"suite={name} is unknown: choose from {', '.join(SUITES)}, several with commas, or all")
    return names
