"""What an optimizer holds: its states between steps, and its working copies while it takes one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from moe_train.config import GQAConfig, MLAConfig, ModelConfig, MuonConfig, OptimizerConfig
from moe_train.cost.flops import (
    ATTENTION_PROJECTIONS,
    DENSE_FFN,
    MTP,
    ROUTED_EXPERTS,
    SHARED_EXPERTS,
    layer_kinds,
)
from moe_train.cost.kernels import MOST_OF_A_MATRIX, DeviceType, Kernels

# What Muon moves, where it is the optimizer (training/optimizers.py), and what is cast before a product.
HIDDEN_MATRICES = (ATTENTION_PROJECTIONS, DENSE_FFN, ROUTED_EXPERTS, SHARED_EXPERTS, MTP)

# Elements that go through Muon's iteration together, at most, but for a single tensor (training/muon.py). Four copies
# exist at once: on a CPU more at a time takes as long (2.3 s a step of `tiny` on one core) and 1.26 GB instead of 0.85;
# on a GPU every batch is 15 launches.
MUON_BATCH_ELEMENTS: dict[DeviceType, int] = {"cpu": 2**22, "cuda": 2**26}

# Elements of BF16 moments that exist in FP32 at a time: a share of an optimizer's, so that the copies stay small
# beside what BF16 saves, within what a device works through efficiently.
CHUNK_SHARE, SMALLEST_CHUNK, LARGEST_CHUNK = 32, 2**16, 2**24

_FP32 = 4
# Bytes an element of a chunk, with rounding to the nearest and at random: AdamW has both moments in FP32, Muon the
# momentum and Nesterov's direction; random numbers and bits are 6 (training/adamw.py, muon.py, moments.py).
_ADAMW_CHUNK, _MUON_CHUNK = (8, 14), (8, 10)


def chunk_elements(elements: int) -> int:
    """How many of an optimizer's `elements` are widened to FP32 at a time where its moments are stored in BF16."""
    return max(SMALLEST_CHUNK, min(LARGEST_CHUNK, elements // CHUNK_SHARE))


def state_bytes(main: dict[str, int], mtp: dict[str, int], optimizer: OptimizerConfig) -> int:
    """Of what is kept between steps, but for step counters, one number a tensor."""
    return (2 if optimizer.moments == "bfloat16" else _FP32) * state_elements(main, mtp, optimizer)


def state_elements(main: dict[str, int], mtp: dict[str, int], optimizer: OptimizerConfig) -> int:
    """Two moments a parameter with AdamW; with Muon one momentum for hidden matrices, AdamW's two for the rest."""
    parameters = sum(main.values()) + sum(mtp.values())
    if not isinstance(optimizer, MuonConfig):
        return 2 * parameters
    return 2 * parameters - sum(parts.get(part, 0) for parts in (main, mtp) for part in HIDDEN_MATRICES)


def adamw_workspace(parameters: int, optimizer: OptimizerConfig, device_type: DeviceType) -> int:
    """Bytes of AdamW's working copies for its `parameters` on a device.

    None with FP32 moments, nor in BF16 on a GPU unless they are rounded at random: a step is then one kernel, whose
    table has 64 bytes a tensor (kernels/adamw.py), which are left out.
    """
    by_kernel = device_type == "cuda" and not optimizer.stochastic_rounding
    if optimizer.moments == "float32" or by_kernel or not parameters:
        return 0
    return _ADAMW_CHUNK[optimizer.stochastic_rounding] * min(chunk_elements(parameters), parameters)


def muon_workspace(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    *,
    device_type: DeviceType,
    kernels: Kernels,
    muon_bytes: int,
    expert_parallel: int = 1,
) -> int:
    """Bytes of Muon's working copies at their most; 0 with AdamW alone.

    `muon_bytes`: of a number in the iteration, 2 where the device multiplies BF16 natively (training/muon.py). Of a
    batch of matrices exist its directions, the iterate before and after, and a Gram matrix and its polynomial. Kernels
    write directions in the format of the iteration; those in C have small matrices in a core's cache.
    """
    if not isinstance(optimizer, MuonConfig):
        return 0
    batches: dict[tuple[int, int], list[int]] = {}
    chunk = chunk_elements(
        sum(count * rows * columns for count, rows, columns in hidden_matrices(model, expert_parallel))
    )
    most = 0
    by_kernels = kernels is not Kernels.TORCH and optimizer.moments == "float32"
    for count, rows, columns in hidden_matrices(model, expert_parallel):
        if by_kernels and kernels is Kernels.COMPILED and rows * columns <= MOST_OF_A_MATRIX:
            continue
        batch = batches.setdefault((rows, columns), [])
        size = count * rows * columns
        if batch and sum(batch) + size > MUON_BATCH_ELEMENTS[device_type]:
            batch.clear()
        batch.append(size)
        elements = sum(batch)
        gram = 2 * elements * min(rows, columns) // max(rows, columns)
        # While directions are made, the last one exists in FP32 as well, or a chunk of it.
        if optimizer.moments == "bfloat16":
            last = _MUON_CHUNK[optimizer.stochastic_rounding] * min(chunk, batch[-1])
        else:
            in_format = muon_bytes == _FP32 or (by_kernels and kernels is Kernels.TRITON)
            last = 0 if in_format else _FP32 * batch[-1]
        making = muon_bytes * elements + last
        most = max(most, making, muon_bytes * (3 * elements + gram))
    return most


def hidden_matrices(model: ModelConfig, expert_parallel: int = 1) -> Iterator[tuple[int, int, int]]:
    """(how many matrices, rows, columns) of each of Muon's tensors, in the order of the model's parameters."""
    kinds = chain(layer_kinds(model), [(model.moe is not None, model.mtp_depth)])
    for nth, (is_moe, count) in enumerate(kinds):
        for _ in range(count):
            if nth == len(layer_kinds(model)):
                yield 1, model.hidden_size, 2 * model.hidden_size
            yield from layer_matrices(model, is_moe, expert_parallel, joined=False)


def layer_matrices(
    model: ModelConfig, is_moe: bool, expert_parallel: int, *, joined: bool = True
) -> Iterator[tuple[int, int, int]]:
    """Those of one layer, which are also the ones that an FP8 recipe is for; gate and up `joined`, or two for Muon."""
    hidden, a = model.hidden_size, model.attention
    heads = a.num_attention_heads
    if isinstance(a, MLAConfig):
        if a.q_lora_rank is None:
            yield 1, heads * a.qk_head_dim, hidden
        else:
            yield 1, a.q_lora_rank, hidden
            yield 1, heads * a.qk_head_dim, a.q_lora_rank
        yield 1, a.kv_lora_rank + a.qk_rope_head_dim, hidden
        yield 1, heads * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank
        yield 1, hidden, heads * a.v_head_dim
    else:
        assert isinstance(a, GQAConfig)
        for rows in (heads, a.num_key_value_heads, a.num_key_value_heads):
            yield 1, rows * a.head_dim, hidden
        yield 1, hidden, heads * a.head_dim
    if not is_moe or model.moe is None:
        yield from _swiglu(1, model.intermediate_size, hidden, joined)
        return
    yield from _swiglu(model.moe.num_experts // expert_parallel, model.moe.moe_intermediate_size, hidden, joined)
    if model.moe.num_shared_experts:
        yield from _swiglu(1, model.moe.num_shared_experts * model.moe.moe_intermediate_size, hidden, joined)


def _swiglu(count: int, width: int, hidden: int, joined: bool) -> Iterator[tuple[int, int, int]]:
    yield (count, 2 * width, hidden) if joined else (2 * count, width, hidden)
    yield count, hidden, width
