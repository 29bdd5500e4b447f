"""Bytes that pass through memory between products, counted by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from moe_train.config import GQAConfig, ModelConfig
from moe_train.forecast.memory_passes import layer_bytes, loss_bytes


def test_a_dense_layer_in_bf16(model_config: Callable[..., ModelConfig]) -> None:
    model = model_config("llama_3_1_8b")
    assert isinstance(model.attention, GQAConfig)
    hidden, width, heads = 4096, 14336, 32 + 8
    once = layer_bytes(model, is_moe=False, fp8=False, devices=1.0)
    # Norms read and write the residual stream and what is added to it; SwiGLU reads two rows and writes one.
    assert once.forward == 2 * 8 * hidden + 4 * heads * 128 + 6 * width
    assert once.inputs == 2 * 12 * hidden + 4 * heads * 128 + 12 * width
    assert once.weights == 0


def test_an_experts_layer_moves_each_row_in_and_out_of_its_place(model_config: Callable[..., ModelConfig]) -> None:
    model = model_config("olmoe_1b_7b")
    hidden, width, visits = 2048, 1024, 8
    alone, spread = (layer_bytes(model, is_moe=True, fp8=False, devices=devices) for devices in (1.0, 5.0))
    dense = dataclasses.replace(model, moe=None, intermediate_size=visits * width)
    same_ffn = layer_bytes(dense, is_moe=False, fp8=False, devices=1.0)
    assert alone.forward - same_ffn.forward == 2 * (2 * (visits + 1)) * hidden
    assert spread.forward - alone.forward == 2 * 2 * 4 * hidden


def test_fp8_reads_every_operand_once_more(model_config: Callable[..., ModelConfig]) -> None:
    model = model_config("llama_3_1_8b")
    hidden, width = 4096, 14336
    bf16, fp8 = (layer_bytes(model, is_moe=False, fp8=fp8, devices=1.0) for fp8 in (False, True))
    inputs = hidden + hidden + hidden + width  # of q, k and v together, of o, of gate and up, of down
    outputs = (32 + 2 * 8) * 128 + hidden + 2 * width + hidden
    assert fp8.forward - bf16.forward == 3 * inputs + 2 * width  # SwiGLU's inputs are kept in FP8 as well
    assert fp8.inputs - bf16.inputs == 3 * outputs - 2 * width
    assert fp8.weights == 2 * inputs + width + outputs


def test_mla_makes_its_keys_again(model_config: Callable[..., ModelConfig]) -> None:
    model = model_config("deepseek_v3")
    narrow = dataclasses.replace(model, attention=dataclasses.replace(model.attention, num_attention_heads=64))
    wide, half = (layer_bytes(each, is_moe=True, fp8=False, devices=7.2) for each in (model, narrow))
    once = 64 * (4 * 64 + 2 * 128 + 2 * 192)  # queries rotated in place, keys put together from two parts
    assert wide.forward - half.forward == once
    assert wide.inputs - half.inputs == 2 * once


def test_logits_are_read_twice_and_their_gradient_written(model_config: Callable[..., ModelConfig]) -> None:
    model = model_config("deepseek_v3", "mtp=depth_1")
    assert loss_bytes(model, 1000).seconds == pytest.approx(2 * 3 * 2 * 1000)
