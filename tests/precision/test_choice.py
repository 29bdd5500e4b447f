"""Which backend multiplies in FP8 where, and what is said when the device lacks the one asked for."""

from __future__ import annotations

import pytest
import yaml

from moe_train.compose import CONFIGS, validated
from moe_train.config import PrecisionConfig
from moe_train.errors import UserError
from moe_train.precision.choice import Device, choose

CPU = Device("a CPU", None, has_triton=False)
SIZES = {128, 256}


def gpu(major: int, minor: int, *, has_triton: bool = True) -> Device:
    return Device(f"a card {major}.{minor}", (major, minor), has_triton)


def precision(name: str, backend: str = "auto", **fp8: object) -> PrecisionConfig:
    content = yaml.safe_load((CONFIGS / f"precision/{name}.yaml").read_text())
    content["fp8"] |= fp8
    return validated(PrecisionConfig, content | {"backend": backend}, name)


@pytest.mark.parametrize(
    ("recipe", "device", "taken"),
    [
        ("fp8_deepseek", CPU, "emulated"),
        ("fp8_rowwise", CPU, "emulated"),
        ("fp8_deepseek", gpu(7, 5), "emulated"),
        ("fp8_deepseek", gpu(8, 9, has_triton=False), "emulated"),
        ("fp8_rowwise", gpu(8, 9, has_triton=False), "emulated"),
        *[("fp8_deepseek", gpu(*version), "triton") for version in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))],
        ("fp8_rowwise", gpu(8, 6), "triton"),
        ("fp8_rowwise", gpu(8, 9), "triton"),
        ("fp8_rowwise", gpu(12, 0), "triton"),
        ("fp8_rowwise", gpu(9, 0), "cublas"),
        ("fp8_tensorwise", gpu(10, 0), "cublas"),
    ],
)
def test_auto_takes_the_fastest_that_can_do_the_recipe_and_says_so(recipe: str, device: Device, taken: str) -> None:
    choice = choose(precision(recipe), device, SIZES)
    assert choice.backend.name == taken
    assert f"({taken})" in choice.note
    assert device.name in choice.note or "Triton is not installed" in choice.note
    assert "\n" not in choice.note


def test_a_cpu_with_kernels_in_c_emulates_by_them_and_says_so() -> None:
    compiled = Device("a CPU", None, has_triton=False, has_compiled=True)
    choice = choose(precision("fp8_deepseek"), compiled, SIZES)
    assert (choice.backend.name, choice.backend.multiplies_in) == ("emulated", "bfloat16")
    assert "multiplied as BF16 numbers by the kernels in C, to FP32 sums (emulated)" in choice.note
    # The sums of Hopper are modelled in PyTorch alone.
    hopper = choose(precision("fp8_deepseek", accumulation="hopper"), compiled, SIZES)
    assert (hopper.backend.name, hopper.backend.multiplies_in) == ("emulated", "float32")
    assert "multiplied in FP32 (emulated)" in hopper.note


def test_before_8_9_the_note_says_in_what_the_kernels_multiply() -> None:
    assert "in FP16, as the device has no FP8 units" in choose(precision("fp8_deepseek"), gpu(8, 6), SIZES).note
    assert "FP16" not in choose(precision("fp8_deepseek"), gpu(8, 9), SIZES).note


@pytest.mark.parametrize(
    ("asked", "recipe", "device", "said"),
    [
        ("cublas", "fp8_deepseek", gpu(9, 0), r"no scales of a block or a tile.*precision=fp8_rowwise"),
        ("cublas", "fp8_rowwise", gpu(8, 6), r"no FP8 units \(compute capability 8.9\).*precision=bf16"),
        ("triton", "fp8_deepseek", CPU, r"interpreter only.*precision.backend=emulated"),
        ("triton", "fp8_deepseek", gpu(7, 5), r"older than compute capability 8.0.*backend=emulated"),
        ("triton", "fp8_deepseek", gpu(9, 0, has_triton=False), r"not installed; install triton"),
    ],
)
def test_what_the_device_lacks_is_an_error_that_names_what_it_has(
    asked: str, recipe: str, device: Device, said: str
) -> None:
    with pytest.raises(UserError, match=said) as error:
        choose(precision(recipe, asked), device, SIZES)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"precision.backend={asked} cannot do precision={recipe} here")


def test_e5m2_is_not_handed_to_torchs_scaled_matmul_on_a_gpu() -> None:
    operand = {"format": "e5m2", "scale_of": "row", "power_of_two": False}
    weight = operand | {"format": "e4m3"}
    gradients = {"input_gradient": {"gradient": operand, "weight": weight}}
    with pytest.raises(UserError, match=r"takes E4M3 alone for experts; the nearest recipe .* precision=fp8_rowwise"):
        choose(precision("fp8_rowwise", "cublas", **gradients), gpu(9, 0), SIZES)
    assert choose(precision("fp8_rowwise", **gradients), gpu(9, 0), SIZES).backend.name == "triton"
    assert choose(precision("fp8_rowwise", "cublas", **gradients), CPU, SIZES).backend.name == "cublas"


def test_sizes_torch_refuses_are_named() -> None:
    with pytest.raises(UserError, match="multiples of 16, and a layer has 100"):
        choose(precision("fp8_rowwise", "cublas"), gpu(9, 0), {100, 128})
    assert choose(precision("fp8_rowwise"), gpu(9, 0), {100, 128}).backend.name == "triton"


@pytest.mark.parametrize("asked", ["cublas", "triton"])
def test_the_model_of_hoppers_accumulation_is_the_emulated_backends_alone(asked: str) -> None:
    with pytest.raises(UserError, match=r"set precision.fp8.accumulation=float32"):
        choose(precision("fp8_tensorwise", asked, accumulation="hopper"), gpu(9, 0), SIZES)
    assert choose(precision("fp8_tensorwise", accumulation="hopper"), gpu(9, 0), SIZES).backend.name == "emulated"


def test_a_backend_without_fp8_to_multiply_is_refused() -> None:
    content = yaml.safe_load((CONFIGS / "precision/bf16.yaml").read_text())
    with pytest.raises(UserError, match=r"backend=cublas says what multiplies in FP8, and precision=bf16 has no FP8"):
        validated(PrecisionConfig, content | {"backend": "cublas"}, "bf16")
    with pytest.raises(UserError, match="evaluate_in_fp8=true has nothing to evaluate in, as precision=bf16"):
        validated(PrecisionConfig, content | {"evaluate_in_fp8": True}, "bf16")
