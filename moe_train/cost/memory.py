"""Memory by formula from the configuration: what a device holds while training, and what a cached token takes.

Weights, gradients and optimizer states are exact (but for AdamW's step counters, one number a tensor). The rest follows
from the order in which a step's tensors are made and let go, written down as the layers are written (`step_tape`,
`block_tape` and what they call); `ASSUMPTIONS` says under which conditions. `peak_training_memory` is the most that is
alive at once, `training_memory` each part at its own most. It is for choosing a batch that fits: allocators, libraries
and kernels that keep memory to themselves take their share on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_train.config import MLAConfig, ModelConfig, MuonConfig, OptimizerConfig
from moe_train.cost.flops import ROUTED_EXPERTS, layer_parameters, main_parameters, mtp_parameters
from moe_train.cost.fp8_operands import Fp8Kept, weight_bytes
from moe_train.cost.kernels import DeviceType, Kernels
from moe_train.cost.layer_tape import FP32, Circumstances
from moe_train.cost.layout import SINGLE, Layout
from moe_train.cost.optimizer_memory import (
    HIDDEN_MATRICES,
    adamw_workspace,
    layer_matrices,
    muon_workspace,
    state_bytes,
)
from moe_train.cost.step_tape import StepTape
from moe_train.cost.tape import (
    ACTIVATIONS,
    COPIES,
    GATHERED,
    GRADIENTS,
    HEAD_GRADIENTS,
    LOSS,
    OPTIMIZER,
    STATES,
    WEIGHTS,
    Tape,
)

ASSUMPTIONS = (
    "one device holds the whole model; nothing is sharded or moved to the CPU",
    "master weights, gradients and the residual stream are FP32; optimizer states are what optimizer.moments says",
    "attention is a fused kernel: no score matrix is kept",
    "the device is a GPU that runs the project's Triton kernels, of compute capability 8.0 or later; with those in C a "
    "CPU needs less, with torch's operations more (cost/kernels.py)",
    "norms keep their input; their results, joined keys and, where they are copied, rows sorted by expert are made "
    "again in the backward pass (precision/remade.py), except where activation checkpointing makes whole layers again",
    "in BF16 the cast weights are kept until the backward pass",
    "with an FP8 recipe every linear layer of the blocks keeps its input, and its weight for each of two products "
    "until the step ends, in FP8 (a byte a value, 4 of scale for 128 of a row), and a SwiGLU's input too where the "
    "recipe has swiglu_input; products are of a kernel that reads FP8: what the emulated backend makes beside them, in "
    "FP32, is left out",
    "experts are evenly loaded; a place that capacity leaves empty is kept like a filled one",
    "activation checkpointing keeps the inputs of every layer, and one layer's activations are alive at a time",
    "dropout off; allocator overhead and communication buffers are left out",
)

Moment = Literal["forward end", "backward", "optimizer"]


@dataclass(frozen=True)
class PeakMemory:
    """What a device holds at the moment of a training step when it holds most."""

    parts: dict[str, int]  # bytes of each part then; those that are empty are left out
    bytes: int  # their sum
    moment: Moment


def cache_elements_per_token(model: ModelConfig) -> int:
    """Elements the main model keeps of every position while it generates, over all layers.

    MLA: one compressed vector and one rotary key a layer (DeepSeek-V2, arXiv 2405.04434, table 1); otherwise keys and
    values of the key-value heads. Speculative decoding with an MTP module adds one layer's for each module.
    """
    attention = model.attention
    if isinstance(attention, MLAConfig):
        return model.num_hidden_layers * (attention.kv_lora_rank + attention.qk_rope_head_dim)
    return model.num_hidden_layers * 2 * attention.num_key_value_heads * attention.head_dim


def peak_training_memory(
    model: ModelConfig,
    vocab_size: int,
    *,
    sequences: int,
    sequence_length: int,
    optimizer: OptimizerConfig,
    compute_bytes: int,
    activation_checkpointing: bool,
    accumulates: bool,
    layout: Layout = SINGLE,
    device_type: DeviceType = "cpu",
    kernels: Kernels | None = None,
    fp8: Fp8Kept | None = None,
) -> PeakMemory:
    """The most bytes of tensors at once during a step of a run under way, on each device of `layout`.

    `sequences` of `sequence_length` tokens go through at once, a micro-batch; `accumulates`: gradients of earlier ones
    are there already. `compute_bytes`: 2 where matrix products run in BF16, 4 in FP32. `fp8`: those of linear layers in
    the blocks run in FP8, and what is kept so. `kernels`: those the step takes, the usual ones of the device if not
    given; torch's operations of a GPU are taken to be a CPU's. Raises UserError where the model cannot be laid out so.

    Measured (docs/log.md): torch's operations and the kernels in C on one CPU (`tensor_peak`) within 10%; Triton's
    kernels interpreted, and a step of `base` on an H200. Not measured: FP8, for a backend that keeps operands as
    ASSUMPTIONS says; every layout but `single`. With `ddp` and `ep`, gradients live on in DDP's buckets. With `fsdp2`,
    two blocks (one ahead) are whole in the compute format, and in FP8 where they multiply in it, beside embedding and
    head, the gradients of a block are whole until it is done, and Muon gathers each batch of matrices (arXiv
    2502.16982, section 2.3). With `ep…`, as many rows are received as sent.
    """
    model = model.resolved()
    layout.check(model)
    kernels = kernels or Kernels.usual(device_type)
    given = Circumstances(compute_bytes, accumulates or layout.keeps_gradients, kernels, layout, fp8)
    tape = Tape()
    for part, size in _between_steps(model, vocab_size, optimizer, layout).items():
        if part != GRADIENTS or given.gradients_exist:
            tape.make(part, size)
    gathered = _gathered(model, vocab_size, given)
    tape.make(GATHERED, gathered)
    step = StepTape(tape, model, vocab_size, sequences, sequence_length, given, activation_checkpointing)
    step.forward()
    forward_end = len(tape.events)
    step.backward()
    tape.drop(GATHERED, gathered)
    backward_end = len(tape.events)
    tape.passing(OPTIMIZER, _optimizer_workspace(model, vocab_size, optimizer, given, device_type))
    highest = tape.highest()
    parts = tape.held(highest)
    moment: Moment = "forward end" if highest <= forward_end else "backward" if highest <= backward_end else "optimizer"
    return PeakMemory(parts, sum(parts.values()), moment)


def training_memory(
    model: ModelConfig,
    vocab_size: int,
    tokens: int,
    optimizer: OptimizerConfig,
    *,
    compute_bytes: int,
    activation_checkpointing: bool,
    kernels: Kernels,
    fp8: Fp8Kept | None = None,
) -> dict[str, int]:
    """Bytes by part, each at its own most, on a device that takes `tokens` tokens at once (a micro-batch).

    Not all are alive together: `peak_training_memory` says what is. `compute_bytes`: 2 where matrix products run in
    BF16, 4 in FP32; `fp8`: those of linear layers are in FP8, and what is kept so; `kernels`: whose operations a step
    is made of. MTP modules are taken to have all positions.
    """
    model = model.resolved()
    given = Circumstances(compute_bytes, False, kernels, SINGLE, fp8)
    tape = Tape()
    step = StepTape(tape, model, vocab_size, 1, tokens, given, activation_checkpointing)
    step.forward()
    kept = tape.held()
    step.backward()
    recomputed = step.largest_recomputed() if activation_checkpointing else 0
    between = _between_steps(model, vocab_size, optimizer, SINGLE)
    return {
        **between,
        COPIES: _most(tape, COPIES),
        ACTIVATIONS: kept[ACTIVATIONS] + recomputed,
        # Kept by the loss until the backward pass: the gradient of the head, once for every prediction.
        HEAD_GRADIENTS: kept[HEAD_GRADIENTS],
        LOSS: _most(tape, LOSS),
    }


def _most(tape: Tape, part: str) -> int:
    of_part = Tape()
    of_part.events = [event for event in tape.events if event[0] == part]
    return sum(of_part.held(of_part.highest()).values()) if of_part.events else 0


def _between_steps(model: ModelConfig, vocab_size: int, optimizer: OptimizerConfig, layout: Layout) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer states on each device."""
    main, mtp = main_parameters(model, vocab_size), mtp_parameters(model)
    routed = main.get(ROUTED_EXPERTS, 0) + mtp.get(ROUTED_EXPERTS, 0)
    routed_states = state_bytes({ROUTED_EXPERTS: routed}, {}, optimizer)
    parameters = _share(FP32 * (sum(main.values()) + sum(mtp.values())), FP32 * routed, layout)
    routing_biases = 0 if model.moe is None else model.num_routers * model.moe.num_experts
    states = _share(state_bytes(main, mtp, optimizer), routed_states, layout)
    return {WEIGHTS: parameters + FP32 * routing_biases, GRADIENTS: parameters, STATES: states}


def _share(of_all: int, of_routed: int, layout: Layout) -> int:
    """What a device holds of a total, of which `of_routed` is of routed experts."""
    return round(of_routed / layout.expert_share + (of_all - of_routed) / layout.shard)


def _optimizer_workspace(
    model: ModelConfig, vocab_size: int, optimizer: OptimizerConfig, given: Circumstances, device_type: DeviceType
) -> int:
    """Bytes of working copies on each device; Muon and the AdamW beside it take their steps one after the other."""
    parts, layout = (main_parameters(model, vocab_size), mtp_parameters(model)), given.layout
    muons = HIDDEN_MATRICES if isinstance(optimizer, MuonConfig) else ()
    adamws = [{part: count for part, count in of.items() if part not in muons} for of in parts]
    routed = sum(of.get(ROUTED_EXPERTS, 0) for of in adamws)
    adamw_parameters = _share(sum(sum(of.values()) for of in adamws), routed, layout)
    adamw = adamw_workspace(adamw_parameters, optimizer, device_type)
    muon = muon_workspace(
        model,
        optimizer,
        device_type=device_type,
        kernels=Kernels.TORCH if given.torch else given.kernels,
        muon_bytes=_muon_bytes(device_type),
        expert_parallel=layout.expert_parallel,
    )
    return max(adamw, muon)


def _gathered(model: ModelConfig, vocab_size: int, given: Circumstances) -> int:
    """Bytes of weights that sharding over devices makes whole: embedding and head, and the two largest blocks."""
    layout = given.layout
    if layout.shard == 1:
        return 0
    outside = vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    blocks = []
    for is_moe in (False, True):
        if is_moe and model.moe is None:
            continue
        parts = layer_parameters(model, is_moe)
        parts[ROUTED_EXPERTS] = parts.get(ROUTED_EXPERTS, 0) // layout.expert_parallel
        size = float(given.compute_bytes * sum(parts.values()))
        if given.fp8 is not None:
            size += weight_bytes(layer_matrices(model, is_moe, layout.expert_parallel))
        blocks.append(size)
    return given.compute_bytes * outside + round(2 * max(blocks))


def _muon_bytes(device_type: DeviceType) -> int:
    if device_type == "cuda":  # compute capability 8.0 and above
        return 2
    from moe_train.precision.support import multiplies_bfloat16

    return 2 if multiplies_bfloat16(device_type) else 4
