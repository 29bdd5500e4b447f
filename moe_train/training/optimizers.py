"""Which parameter gets which optimizer and whether it decays, and one learning-rate factor for all of them.

Weight decay is for matrices; norms and biases have no scale to hold back, and an embedding's row would shrink at every
step in which its token does not occur. Muon is for hidden matrices: the embedding, the output head and the router are
looked up or read row by row (a row a token or an expert), and go with AdamW (https://kellerjordan.github.io/posts/muon/).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_train.config import AdamWConfig, OptimizerConfig
from moe_train.parallel.whole_matrices import Copies, WholeMatrices
from moe_train.training.adamw import BF16AdamW, KernelAdamW
from moe_train.training.clipping import kernels_take
from moe_train.training.moments import Rounding
from moe_train.training.muon import Muon
from moe_train.uncompiled import AdamW, leave_optimizers_out


def build_optimizers(
    model: nn.Module,
    config: OptimizerConfig,
    seed: int = 0,
    *,
    local: Callable[[str], nn.Parameter] | None = None,
    whole: WholeMatrices | None = None,
    copies: Copies | None = None,
    part: int = 0,
) -> list[torch.optim.Optimizer]:
    """One or two optimizers over all trainable parameters of the bare model (before any wrapper renames them).

    `seed`: of stochastic rounding, where the configuration has it. Every group keeps its peak rate under "base_lr", for
    `set_lr`. A head tied to the embedding is the embedding. Of a model that is spread over processes: `local` gives
    what this one, the `part`-th, holds of the parameter of a name, `whole` knows the matrices that it holds rows of,
    `copies` those that others have as well.
    """
    leave_optimizers_out()
    # id, as tensors compare by value
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    here = {id(p): p if local is None else local(name) for name, p in trainable.items()}
    optimizers: list[torch.optim.Optimizer] = []
    rounding = Rounding(config.stochastic_rounding, seed, part=part)
    if isinstance(config, AdamWConfig):
        groups = _decay_groups(list(trainable.values()), embeddings, config.weight_decay, here)
        optimizers.append(_adamw(groups, config, config.betas, config.eps, rounding))
    else:
        hidden = [p for name, p in trainable.items() if _is_hidden_matrix(name, p) and id(p) not in embeddings]
        taken = {id(p) for p in hidden}
        rest = [p for p in trainable.values() if id(p) not in taken]
        if hidden:
            optimizers.append(
                Muon(
                    [here[id(p)] for p in hidden],
                    lr=config.lr,
                    momentum=config.momentum,
                    nesterov=config.nesterov,
                    ns_steps=config.ns_steps,
                    weight_decay=config.weight_decay,
                    momentum_dtype=getattr(torch, config.moments),
                    rounding=dataclasses.replace(rounding, stream=1),
                    whole=whole,
                    copies=copies,
                    joined=[here[id(p)] for name, p in trainable.items() if "gate_up_proj" in name.split(".")],
                )
            )
        if rest:
            groups = _decay_groups(rest, embeddings, config.weight_decay, here)
            optimizers.append(_adamw(groups, config, config.adamw_betas, config.adamw_eps, rounding))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def _adamw(
    groups: list[dict[str, Any]], config: OptimizerConfig, betas: tuple[float, float], eps: float, rounding: Rounding
) -> torch.optim.Optimizer:
    if config.moments == "float32":
        by_kernel = kernels_take(parameter for group in groups for parameter in group["params"])
        kind = KernelAdamW if by_kernel else AdamW
        return kind(groups, lr=config.lr, betas=betas, eps=eps, fused=True)
    return BF16AdamW(groups, lr=config.lr, betas=betas, eps=eps, rounding=rounding)


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Give every group `factor` of its peak rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


def _is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim in (2, 3) and "lm_head" not in name.split(".") and not name.endswith("router.weight")


def _decay_groups(
    parameters: list[nn.Parameter],
    embeddings: set[int],
    weight_decay: float,
    here: dict[int, nn.Parameter],
) -> list[dict[str, Any]]:
    decayed = [here[id(p)] for p in parameters if p.ndim >= 2 and id(p) not in embeddings]
    others = [here[id(p)] for p in parameters if p.ndim < 2 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
