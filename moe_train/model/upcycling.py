"""A mixture of experts out of a trained dense model (sparse upcycling, arXiv 2212.05055).

Every expert starts as a copy of the dense FFN, or, where experts are narrower, as one of its slices (arXiv 2410.07524):
experts are then laid out in replicas of the whole FFN, the slices of one replica have one router row and so are chosen
together. What is not copied is arranged so that the mixture computes exactly what the dense model did: gates sum to
one, down-projections make up for the number of slices, shared experts and the padding of a last slice start with a
down-projection of zero. Training takes it from there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_train.config import ModelConfig, MoEConfig
from moe_train.errors import UserError


def upcycled(
    dense: dict[str, Tensor], mixture: ModelConfig, shapes: dict[str, torch.Size], seed: int
) -> dict[str, Tensor]:
    """The weights of `mixture` from those of a dense model alike in all but its FFNs.

    dense: its state dict; shapes: those of the mixture's state dict; seed: of the rows drawn anew.
    Raises UserError where the mixture could not start as the same function, naming the key to change.
    """
    moe = mixture.moe
    if moe is None:
        raise UserError(f"model={mixture.name} is dense: choose a mixture of experts to make of the dense model")
    _check_exact(moe)
    generator = torch.Generator().manual_seed(seed)

    def drawn(shape: torch.Size) -> Tensor:
        return torch.empty(shape).normal_(0, mixture.initializer_range, generator=generator)

    made: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name in dense:
            if dense[name].shape != shape:
                raise UserError(_mismatch(name, dense[name].shape, shape))
            made[name] = dense[name].clone()
            continue
        ffn, _, part = name.partition(".ffn.")
        if f"{ffn}.ffn.down_proj.weight" not in dense:
            raise UserError(f"{name} has nothing to start from in the dense model: leave that part out of the mixture")
        gate_up_fd, down_df = dense[f"{ffn}.ffn.gate_up_proj.weight"], dense[f"{ffn}.ffn.down_proj.weight"]
        slices = _num_slices(moe, down_df.shape[1])
        if part == "router.selection_bias" or part == "shared_experts.down_proj.weight":
            made[name] = torch.zeros(shape)
        elif part == "router.weight":  # expert e is slice e % slices of replica e // slices
            made[name] = drawn(torch.Size((shape[0] // slices, shape[1]))).repeat_interleave(slices, 0)
        elif part == "shared_experts.gate_up_proj.weight":
            made[name] = drawn(shape)
        elif part == "experts.gate_up_proj":
            gate, up = (_sliced(half.t(), slices, shape[1] // 2, drawn) for half in gate_up_fd.chunk(2))
            made[name] = torch.cat((gate, up), -1).transpose(1, 2).repeat(shape[0] // slices, 1, 1).contiguous()
        else:
            scale = slices / moe.routed_scaling_factor
            cut = _sliced(down_df * scale, slices, shape[2], torch.zeros)
            made[name] = cut.repeat(shape[0] // slices, 1, 1).contiguous()
    unused = [name for name in dense if name not in shapes and ".ffn." not in name]
    if unused:
        raise UserError(
            f"{unused[0]} of the dense model has no place in the mixture: give it the same attention and MTP"
        )
    return made


def _check_exact(moe: MoEConfig) -> None:
    wanted = {
        "routing=token_choice": moe.routing == "token_choice",
        "norm_topk_prob=true": moe.norm_topk_prob,
        "n_group=1": moe.topk_group == moe.n_group,
    }
    for setting, given in wanted.items():
        if not given:
            raise UserError(
                f"a mixture can only start as the dense model's function if its gates sum to one over freely chosen "
                f"experts: give model.moe.{setting}"
            )


def _num_slices(moe: MoEConfig, dense_width: int) -> int:
    """How many experts make up one copy of the dense FFN."""
    slices = -(-dense_width // moe.moe_intermediate_size)
    for key, value in (("num_experts", moe.num_experts), ("top_k", moe.top_k)):
        if value % slices:
            raise UserError(
                f"the dense FFN of width {dense_width} is {slices} experts of moe_intermediate_size="
                f"{moe.moe_intermediate_size}, and {key}={value} is no multiple of {slices}: change it, or give "
                f"model.moe.moe_intermediate_size={dense_width} for experts that are whole copies"
            )
    return slices


def _sliced(matrix_df: Tensor, slices: int, width: int, fill: Callable[[torch.Size], Tensor]) -> Tensor:
    """The columns in `slices` pieces of `width`, the last one filled up: (slices, d, width)."""
    rows, columns = matrix_df.shape
    padding = fill(torch.Size((rows, slices * width - columns)))
    pieces_sdw: Tensor = torch.cat((matrix_df, padding), 1).unflatten(1, (slices, width)).transpose(0, 1)
    return pieces_sdw


def _mismatch(name: str, dense: torch.Size, mixture: torch.Size) -> str:
    remedy = "give the mixture the sizes of the dense model"
    if ".ffn." in name:
        width = dense[-1] if "down_proj" in name else dense[0] // 2
        remedy = f"give model.intermediate_size={width}, or model.moe.first_k_dense_replace=0"
    return f"{name} is {tuple(dense)} in the dense model and {tuple(mixture)} in the mixture: {remedy}"
