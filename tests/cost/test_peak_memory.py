"""The peak of a training step by formula against the tensors that are really alive, counted while a step is taken."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from taken_kernels import taken
from torch import Tensor, nn

from moe_train.config import AdamWConfig, ModelConfig, MuonConfig, OptimizerConfig
from moe_train.cost.flops import main_parameters, mtp_parameters
from moe_train.cost.fp8_operands import Fp8Kept
from moe_train.cost.kernels import Kernels
from moe_train.cost.layer_tape import Circumstances
from moe_train.cost.layout import SINGLE, Layout
from moe_train.cost.memory import PeakMemory, peak_training_memory
from moe_train.cost.optimizer_memory import HIDDEN_MATRICES, hidden_matrices
from moe_train.cost.step_tape import StepTape
from moe_train.cost.tape import Tape
from moe_train.cost.tensor_peak import TensorPeak
from moe_train.errors import UserError
from moe_train.model.transformer import Transformer
from moe_train.training.optimizers import build_optimizers

MakeConfig = Callable[..., ModelConfig]

RESULTS = Path(__file__).parents[2] / "docs" / "results"
VOCAB = 4096
ADAMW = AdamWConfig("adamw", 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0)
MUON = MuonConfig("muon", 1e-3, 0.95, True, 5, 0.1, 1.0, (0.9, 0.95), 1e-8)
ADAMW_BF16, MUON_BF16 = (replace(config, moments="bfloat16") for config in (ADAMW, MUON))
ADAMW_AT_RANDOM, MUON_AT_RANDOM = (replace(config, stochastic_rounding=True) for config in (ADAMW_BF16, MUON_BF16))
# model and its overrides; sequences, length; compute bytes, checkpointing, optimizer, micro-batches
CASES: dict[str, tuple[list[str], tuple[int, int], int, bool, OptimizerConfig, int]] = {
    "nano": (["nano"], (8, 256), 4, False, ADAMW, 1),
    "nano_bf16_muon": (["nano"], (4, 256), 2, False, MUON, 1),
    "nano_few_tokens": (["nano"], (2, 128), 4, True, MUON, 1),
    "nano_recomputed": (["nano"], (4, 256), 2, True, ADAMW, 1),
    "nano_accumulated": (["nano"], (4, 256), 4, True, ADAMW, 2),
    "nano_long": (["nano"], (1, 1024), 2, False, ADAMW, 2),
    "tiny": (["tiny"], (1, 128), 2, True, MUON, 1),
    "tiny_many_tokens": (["tiny"], (8, 256), 2, False, MUON, 1),
    "tiny_fp32": (["tiny"], (1, 128), 4, False, ADAMW, 1),
    "dense": (["dense_nano"], (4, 256), 4, False, ADAMW, 1),
    "gqa": (["nano", "attention=gqa_4x32"], (4, 256), 4, False, ADAMW, 1),
    "gqa_normed": (["nano", "attention=gqa_4x32", "attention.qk_norm=per_head"], (4, 256), 2, True, ADAMW, 1),
    "mha": (["nano", "attention=mha_4x32"], (4, 256), 2, False, MUON, 2),
    "queries_compressed": (["nano", "attention.q_lora_rank=48"], (4, 256), 4, True, ADAMW, 1),
    "mtp": (["nano", "mtp=depth_1"], (4, 256), 2, False, ADAMW, 1),
    "mtp_recomputed": (["nano", "mtp=depth_2", "tie_word_embeddings=false"], (4, 256), 2, True, MUON, 2),
    "switch": (["nano", "moe=switch"], (4, 256), 2, False, MUON, 1),
    "expert_choice": (["nano", "moe=expert_choice"], (4, 256), 4, True, ADAMW, 1),
    "batch_loss": (["nano", "moe=batch_loss"], (4, 256), 4, False, MUON, 2),
    "adamw_bf16": (["nano"], (2, 128), 2, False, ADAMW_BF16, 1),
    "adamw_at_random": (["nano"], (2, 128), 2, True, ADAMW_AT_RANDOM, 2),
    "muon_bf16": (["nano"], (2, 128), 4, False, MUON_BF16, 1),
    "muon_at_random": (["nano"], (1, 16), 2, True, MUON_AT_RANDOM, 1),  # the peak is the optimizer's
}


def train(
    model: Transformer,
    shape: tuple[int, int],
    compute_bytes: int,
    optimizer: OptimizerConfig,
    micro_batches: int,
    kernels: Kernels = Kernels.TORCH,
) -> TensorPeak:
    """Two steps as `training/step.py` takes them, the second of them metered."""
    optimizers = build_optimizers(model, optimizer)
    generator = torch.Generator().manual_seed(0)
    count = (2, micro_batches * shape[0], shape[1])
    tokens, targets = torch.randint(0, model.vocab_size, count, generator=generator)
    held = [*model.parameters(), *model.buffers()]
    with taken(kernels, in_bf16=compute_bytes == 2), TensorPeak(held) as meter:
        for _ in range(2):
            meter.reset()
            for piece, goals in zip(tokens.split(shape[0]), targets.split(shape[0])):
                with torch.autocast("cpu", torch.bfloat16, enabled=compute_bytes == 2):
                    losses = model(piece, goals, 0.3)
                (losses.objective / targets.numel()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for each in optimizers:
                each.step()
                each.zero_grad(set_to_none=True)
    return meter


def predicted(
    config: ModelConfig,
    shape: tuple[int, int],
    compute_bytes: int = 4,
    checkpointing: bool = False,
    optimizer: OptimizerConfig = ADAMW,
    micro_batches: int = 1,
    layout: Layout = SINGLE,
    fp8: Fp8Kept | None = None,
    kernels: Kernels = Kernels.TORCH,
    vocab_size: int = VOCAB,
) -> PeakMemory:
    return peak_training_memory(
        config,
        vocab_size,
        sequences=shape[0],
        sequence_length=shape[1],
        optimizer=optimizer,
        compute_bytes=compute_bytes,
        activation_checkpointing=checkpointing,
        accumulates=micro_batches > 1,
        layout=layout,
        fp8=fp8,
        kernels=kernels,
    )


@pytest.mark.parametrize(
    ("case", "kernels"),
    [*((case, Kernels.TORCH) for case in CASES), *((case, Kernels.COMPILED) for case in CASES if CASES[case][2] == 2)],
)
def test_the_peak_of_a_step_is_predicted_within_ten_percent(
    case: str, kernels: Kernels, model_config: MakeConfig
) -> None:
    name, shape, compute_bytes, checkpointing, optimizer, micro_batches = CASES[case]
    model = Transformer(model_config(*name), VOCAB, activation_checkpointing=checkpointing)
    model.initialise(0)
    measured = train(model, shape, compute_bytes, optimizer, micro_batches, kernels).peak
    arguments = (model.config, shape, compute_bytes, checkpointing, optimizer, micro_batches)
    expected = predicted(*arguments, kernels=kernels)
    assert expected.bytes == pytest.approx(measured, rel=0.10)
    assert expected.bytes == sum(expected.parts.values())
    assert min(expected.parts.values()) > 0


@pytest.mark.parametrize("kernels", Kernels)
@pytest.mark.parametrize("more", [[], ["attention=gqa_4x32"]], ids=["mla", "gqa"])
def test_a_step_by_kernels_takes_what_is_foretold_of_them_and_not_of_torchs_operations(
    more: list[str], kernels: Kernels, small_model: Callable[..., Transformer]
) -> None:
    """Beside weights and states: of one layer, where most is what the passes make and let go."""
    one_layer = ("hidden_size=256", "num_hidden_layers=1", "moe.first_k_dense_replace=0", "moe.top_k=6", *more)
    model = small_model(*one_layer, dtype=torch.float32)
    peak = train(model, (2, 64), 2, ADAMW, 1, kernels).peak
    expected = predicted(model.config, (2, 64), 2, kernels=kernels, vocab_size=model.vocab_size)
    of_torch = predicted(model.config, (2, 64), 2, vocab_size=model.vocab_size)
    held = expected.parts["weights"] + expected.parts["optimizer_states"]
    assert expected.bytes - held == pytest.approx(peak - held, rel=0.10)
    if kernels is not Kernels.TORCH:
        assert of_torch.bytes - held != pytest.approx(peak - held, rel=0.10)


def test_a_step_of_an_h200_took_what_is_foretold(model_config: MakeConfig) -> None:
    """What torch.cuda counted, with Triton's kernels and without a CUDA graph (docs/results/nvidia_h200.json)."""
    results = json.loads((RESULTS / "nvidia_h200.json").read_text())
    peaks = {each["of"]: each["value"] for each in results["figures"] if each["name"] == "peak_memory_bytes"}
    found = {re.fullmatch(r"base, (\d+) × (\d+) tokens, BF16, adamw", of): peak for of, peak in peaks.items()}
    whole = {(int(of[1]), int(of[2])): peak for of, peak in found.items() if of is not None}
    assert whole
    for shape, peak in whole.items():
        expected, of_torch = (
            predicted(model_config("base"), shape, 2, kernels=each) for each in (Kernels.TRITON, Kernels.TORCH)
        )
        assert expected.bytes == pytest.approx(peak, rel=0.03)
        assert of_torch.bytes > 1.05 * peak


def lowest(tape: Tape) -> int:
    """The least bytes that a part ever has."""
    held: Counter[str] = Counter()
    least = 0
    for part, size in tape.events:
        held[part] += size
        least = min(least, held[part])
    return least


@pytest.mark.parametrize("more", [[], ["mtp=depth_2", "tie_word_embeddings=false"], ["moe=switch"]], ids=str)
@pytest.mark.parametrize("name", ["mla", "dense", "gqa"])
def test_every_tensor_that_is_made_is_let_go_again(name: str, more: list[str], model_config: MakeConfig) -> None:
    """But for the gradients: the passes are written down without a leak."""
    kinds = {
        "mla": ["nano", "attention.q_lora_rank=48"],
        "dense": ["dense_nano"],
        "gqa": ["nano", "attention=gqa_4x32", "attention.qk_norm=per_head"],
    }
    config = model_config(*kinds[name], *more)
    parts = (main_parameters(config, VOCAB), mtp_parameters(config))
    matrices = sum(size for of in parts for part, size in of.items() if part != "norms")
    kept = (None, Fp8Kept(), Fp8Kept(swiglu_input=False), Fp8Kept(by_token=False))
    for compute_bytes, kernels, checkpointing, fp8 in itertools.product((2, 4), Kernels, (False, True), kept):
        circumstances = Circumstances(compute_bytes, False, kernels, SINGLE, fp8)
        step = StepTape(Tape(), config, VOCAB, 3, 40, circumstances, checkpointing)
        step.forward()
        step.backward()
        assert step.tape.held() == {"gradients": 4 * matrices}
        assert lowest(step.tape) > -16  # nothing before it was made, to rounding


@settings(max_examples=25, deadline=None)
@given(
    sequences=st.integers(1, 64),
    length=st.integers(2, 2048),
    more=st.integers(1, 64),
    checkpointing=st.booleans(),
    compute_bytes=st.sampled_from([2, 4]),
)
def test_more_sequences_or_longer_ones_never_take_less(
    sequences: int, length: int, more: int, checkpointing: bool, compute_bytes: int, model_config: MakeConfig
) -> None:
    config = model_config("nano", "mtp=depth_1")
    least = predicted(config, (sequences, length), compute_bytes, checkpointing).bytes
    assert predicted(config, (sequences + more, length), compute_bytes, checkpointing).bytes >= least
    assert predicted(config, (sequences, length + more), compute_bytes, checkpointing).bytes >= least


@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=lambda config: config.kind)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stochastic", [False, True])
def test_working_copies_of_bf16_moments_do_not_undo_what_they_save(
    optimizer: OptimizerConfig, checkpointing: bool, stochastic: bool, model_config: MakeConfig
) -> None:
    narrow = replace(optimizer, moments="bfloat16", stochastic_rounding=stochastic)
    for name in ("nano", "base", "deepseek_v2_lite"):
        wide_peak, narrow_peak = (
            predicted(model_config(name), (1, 16), 2, checkpointing, each) for each in (optimizer, narrow)
        )
        saved = wide_peak.parts["optimizer_states"] // 2
        assert narrow_peak.parts["optimizer_states"] == saved
        assert narrow_peak.bytes <= wide_peak.bytes - 0.85 * saved


def test_the_moment_of_the_peak_follows_what_dominates(model_config: MakeConfig) -> None:
    config = model_config("nano")
    assert predicted(config, (8, 64)).moment == "forward end"
    assert predicted(config, (16, 256), checkpointing=True).moment == "backward"
    assert predicted(config, (1, 16), checkpointing=True, optimizer=MUON).moment == "optimizer"


def test_the_matrices_of_muon_are_those_of_the_model(model_config: MakeConfig) -> None:
    for overrides in ([], ["attention=gqa_4x32", "mtp=depth_2"], ["attention.q_lora_rank=48", "moe=switch"]):
        config = model_config("nano", *overrides)
        built = build_optimizers(Transformer(config, VOCAB), MUON)[0]
        parameters = [p for group in built.param_groups for p in group["params"]]
        shapes = [(p.numel() // math.prod(built.matrix_shape(p)), *built.matrix_shape(p)) for p in parameters]
        assert sorted(shapes) == sorted(hidden_matrices(config))
        parts = (main_parameters(config, VOCAB), mtp_parameters(config))
        expected = sum(of.get(part, 0) for of in parts for part in HIDDEN_MATRICES)
        assert sum(n * rows * columns for n, rows, columns in hidden_matrices(config)) == expected


def test_layouts_share_out_what_they_say(model_config: MakeConfig) -> None:
    config = model_config("base")
    one = predicted(config, (1, 512)).parts
    sharded = predicted(config, (1, 512), layout=Layout.named("fsdp2", 8)).parts
    assert sharded["weights"] == pytest.approx(one["weights"] / 8, rel=1e-3)
    assert sharded["optimizer_states"] == pytest.approx(one["optimizer_states"] / 8, rel=1e-3)
    assert sharded["gathered_weights"] > 0
    spread = predicted(config, (1, 512), layout=Layout.named("ep", 8)).parts
    routed = 4 * main_parameters(config, VOCAB)["routed_experts"]
    assert spread["weights"] == pytest.approx(one["weights"] - routed * 7 / 8, rel=1e-3)
    copies = predicted(config, (1, 512), layout=Layout.named("ddp", 8))
    assert copies.parts["weights"] == one["weights"]
    assert copies.bytes >= predicted(config, (1, 512), micro_batches=2).bytes  # gradients live on in buckets
    both = predicted(config, (1, 512), layout=Layout.named("ep_fsdp2", 32, expert_parallel=8))
    assert both.bytes < min(sum(sharded.values()), sum(spread.values()))


def test_sharded_weights_have_their_fp8_forms_in_two_blocks_at_a_time(model_config: MakeConfig) -> None:
    config = model_config("base")
    wide, fp8 = (
        predicted(config, (1, 512), 2, layout=Layout.named("fsdp2", 8), fp8=each).parts for each in (None, Fp8Kept())
    )
    outside = 2 * VOCAB * config.hidden_size
    blocks = (wide["gathered_weights"] - outside) / 2  # parameters of two, in BF16
    assert fp8["gathered_weights"] - wide["gathered_weights"] == pytest.approx(2 * (1 + 4 / 128) * blocks, rel=0.02)
    assert "weight_copies" not in fp8


@pytest.mark.parametrize(
    ("name", "devices", "experts", "words"),
    [
        ("single", 2, None, "choose ddp, fsdp2 or ep"),
        ("zero", 2, None, "choose one of them"),
        ("ddp", 0, None, "at least 1"),
        ("fsdp2", 8, 2, "choose ep or ep_fsdp2"),
        ("ep_fsdp2", 8, 3, "choose a divisor"),
        ("ep", 12, None, "does not divide the 16 experts"),
    ],
)
def test_what_cannot_be_laid_out_is_refused_with_the_remedy(
    name: str, devices: int, experts: int | None, words: str, model_config: MakeConfig
) -> None:
    with pytest.raises(UserError, match=words):
        predicted(model_config("nano"), (1, 16), layout=Layout.named(name, devices, experts))


def test_a_dense_model_has_no_experts_to_spread(model_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="choose fsdp2 or ddp"):
        predicted(model_config("dense_nano"), (1, 16), layout=Layout.named("ep", 2))


def test_the_meter_counts_temporaries_and_what_backward_passes_make() -> None:
    size = 4 * 1024
    x = torch.ones(1024, requires_grad=True)
    with TensorPeak([x]) as meter:
        y = (x * 2).exp()  # the product is let go once exp is done
        assert (meter.bytes, meter.peak) == (2 * size, 3 * size)
        meter.reset()
        torch.autograd.backward(y, torch.ones(1024))
        assert meter.peak >= 4 * size
        del y
        assert meter.bytes <= 3 * size
        small = torch.zeros(1)
        assert meter.bytes % 512 == 0
        view: Tensor = small.view(1, 1)
        before = meter.bytes
        del small
        assert meter.bytes == before  # the view keeps it
        del view
        assert meter.bytes == before - 512


def test_the_meter_agrees_with_what_the_cpus_allocator_handed_out(model_config: MakeConfig) -> None:
    model = Transformer(model_config("nano"), VOCAB)
    model.initialise(0)
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    metered = train(model, (4, 128), 4, ADAMW, 1).peak - held
    model.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(model, (4, 128), 4, ADAMW, 1)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    assert metered == pytest.approx(peak, rel=0.03)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account")
def test_resident_memory_grows_by_the_peak_of_the_tensors(tmp_path: Path) -> None:
    """In a process of its own, in FP32, with a heap that gives back what is freed, above 1 GB of tensors."""
    script = tmp_path / "steps.py"
    script.write_text(
        """
import json, test_peak_memory as here, torch
from pathlib import Path
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from moe_train.compose import CONFIGS, validated
from moe_train.config import ModelConfig
import psutil
from moe_train.model.transformer import Transformer

torch.set_num_threads(1)
with initialize_config_dir(str(CONFIGS / "model"), version_base="1.3"):
    nano, tiny = (validated(ModelConfig, OmegaConf.to_container(compose(n)), n).resolved() for n in ("nano", "tiny"))

def steps(config, shape):
    model = Transformer(config, here.VOCAB)
    model.initialise(0)
    optimizers = here.build_optimizers(model, here.ADAMW)
    for _ in range(2):
        tokens, targets = torch.randint(0, here.VOCAB, (2, *shape))
        model(tokens, targets).objective.div(targets.numel()).backward()
        for each in optimizers:
            each.step()
            each.zero_grad(set_to_none=True)

steps(nano, (1, 32))
before = psutil.Process().memory_info().rss
peak = here.predicted(tiny, (32, 256))
steps(tiny, (32, 256))
# Not ru_maxrss, which a process takes over from the one that started it.
(high,) = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
most = 1024 * int(high)
print(json.dumps([peak.bytes, most - before]))
"""
    )
    here = Path(__file__).parent
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "PYTHONPATH": os.pathsep.join(str(folder) for folder in (here, *here.parents[:2])),
    }
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    tensors, growth = json.loads(done.stdout)
    assert tensors > 10**9
    assert growth == pytest.approx(tensors, rel=0.10)
