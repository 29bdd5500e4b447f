"""In what number format each matrix product runs. A recipe is data: a file of configs/precision."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from moe_train.config.fields import STRICT, Fraction, require


@dataclass(frozen=True, config=STRICT)
class OperandConfig:
    """How one operand of a product is rounded. Its rows are those of the product, its columns what is summed over.

    scale_of: the elements that share a scale: 128 of a row (tile: DeepSeek-V3's 1 x 128, which is 128 x 1 of the stored
    tensor where tokens are summed over), 128 x 128 (block), a whole row, or the whole tensor. A scale is the largest
    magnitude of the moment over the largest value of the format, rounded up to a power of two or left as it is.
    """

    format: Literal["e4m3", "e5m2"]
    scale_of: Literal["tile", "block", "row", "tensor"]
    power_of_two: bool


@dataclass(frozen=True, config=STRICT)
class ForwardConfig:
    activation: OperandConfig
    weight: OperandConfig


@dataclass(frozen=True, config=STRICT)
class InputGradientConfig:
    gradient: OperandConfig
    weight: OperandConfig


@dataclass(frozen=True, config=STRICT)
class WeightGradientConfig:
    gradient: OperandConfig
    activation: OperandConfig


@dataclass(frozen=True, config=STRICT)
class Fp8Config:
    """FP8 for the three products of every linear layer of the blocks, routed experts included.

    Router, norms, embedding, head and the core of attention are never in FP8 (arXiv 2412.19437, section 3.3.1).
    """

    forward: ForwardConfig
    input_gradient: InputGradientConfig
    weight_gradient: WeightGradientConfig
    # Layers whose input has scales that are powers of two, by the end of their names: rounded along rows, then along
    # columns, it loses nothing twice (section 3.3.3: the projection after attention; routed experts, which get theirs
    # from other devices in FP8).
    power_of_two_inputs_of: tuple[str, ...]
    # What the input of a SwiGLU is kept in until the backward pass, which makes its result again (section 3.3.3); null:
    # in the compute format.
    swiglu_input: OperandConfig | None
    # Of sums over the inner dimension. hopper: 14 bits within 128 products, FP32 between (section 3.3.2).
    accumulation: Literal["float32", "hopper"]
    # The same of the gradient of a layer's result (routed experts get it in FP8 too); recipes of older runs have none.
    power_of_two_gradients_of: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class Fp8HealthConfig:
    """How much of an operand FP8 may lose on a logged step, by layer, and what is done beyond (precision/health.py).

    A rate is allowed up to its maximum, and any where that is null. warn: the run says it once for each layer. stop: it
    ends, its last step saved. compute_format: the layer's products are in the compute format from the next step on, for
    as long as the run keeps its recipe; both layers of a SwiGLU go together.
    """

    max_underflow_rate: Fraction | None
    max_saturation_rate: Fraction | None
    max_nonfinite_rate: Fraction | None
    action: Literal["warn", "stop", "compute_format"]


@dataclass(frozen=True, config=STRICT)
class PrecisionConfig:
    """In what number format matrix products run; weights and gradients stay in FP32."""

    name: str
    compute_dtype: Literal["auto", "float32", "bfloat16"]  # auto: bfloat16 where the device multiplies it faster
    fp8: Fp8Config | None  # of linear layers; None: they run in the compute format too
    # What multiplies in FP8 (precision/choice.py); an error where the device lacks it. auto: the run says what it took.
    backend: Literal["auto", "emulated", "cublas", "triton"]
    evaluate_in_fp8: bool  # False: evaluation uses the compute format throughout
    health: Fp8HealthConfig | None = None  # None: nothing is counted, as in configurations of older runs

    def __post_init__(self) -> None:
        require(
            self.fp8 is not None or self.health is None,
            f"health says what FP8 may lose, and precision={self.name} has no FP8: leave it null",
        )
        require(
            self.fp8 is not None or not self.evaluate_in_fp8,
            f"evaluate_in_fp8=true has nothing to evaluate in, as precision={self.name} has no FP8: leave it false",
        )
        require(
            self.fp8 is not None or self.backend == "auto",
            f"backend={self.backend} says what multiplies in FP8, and precision={self.name} has no FP8: leave it auto",
        )
