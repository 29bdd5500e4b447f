"""Configuration: every file in configs/ composes, twins cost the same, mistakes are one line with key and remedy."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from moe_train.compose import CONFIGS, validated
from moe_train.config import AdamWConfig, GQAConfig, ModelConfig, RunConfig
from moe_train.cost.flops import forward_flops, parameter_counts, training_flops_per_token
from moe_train.errors import UserError

Compose = Callable[..., RunConfig]
SIZES = ("nano", "tiny", "small", "base")


def choices(group: str) -> list[str]:
    return sorted(f.stem for f in (CONFIGS / group).glob("*.yaml") if f.stem != "base" or group == "model")


@pytest.mark.parametrize(
    "override",
    [
        f"{group}={choice}"
        for group in ("model", "data", "precision", "optimizer", "schedule", "hardware", "tracking")
        for choice in choices(group)
    ]
    + [f"{group}={choice}" for group in ("debug", "experiment") for choice in choices(group)],
)
def test_every_choice_of_every_group_composes_into_a_valid_run(override: str, compose_run: Compose) -> None:
    compose_run(override)


@pytest.mark.parametrize("size", SIZES)
def test_a_dense_twin_costs_the_same_flops_a_token_within_one_percent(
    size: str, model_config: Callable[..., ModelConfig]
) -> None:
    moe, dense = model_config(size), model_config(f"dense_{size}")
    assert dense.moe is None
    assert training_flops_per_token(dense, 256, 4096) == pytest.approx(
        training_flops_per_token(moe, 256, 4096), rel=0.01
    )


def test_a_twins_width_follows_the_moe_settings_it_is_the_twin_of(model_config: Callable[..., ModelConfig]) -> None:
    narrow, wide = model_config("dense_nano", "moe.top_k=2"), model_config("dense_nano", "moe.top_k=8")
    assert wide.intermediate_size > narrow.intermediate_size
    moe = model_config("nano", "moe.top_k=8")
    flops = [sum(forward_flops(m, 256, 4096).values()) for m in (wide, moe)]
    assert flops[0] == pytest.approx(flops[1], rel=0.01)


@pytest.mark.parametrize(
    ("size", "active", "total"),
    [("nano", 1e6, 2e6), ("tiny", 6e6, 27e6), ("small", 25e6, 125e6), ("base", 105e6, 0.8e9)],
)
def test_the_sizes_have_about_the_parameters_they_say(
    size: str, active: float, total: float, model_config: Callable[..., ModelConfig]
) -> None:
    counts = parameter_counts(model_config(size), 4096)
    assert counts.active == pytest.approx(active, rel=0.25)
    assert counts.total == pytest.approx(total, rel=0.1)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["+model.moe.nexperts=8"], "unknown key model.moe.nexperts: did you mean num_experts?"),
        (["+speed=8"], "unknown key speed"),
        (["optimizer.lr=abc"], 'optimizer.lr="abc": input should be a valid number'),
        (["optimizer.lr=-1"], "optimizer.lr=-1: input should be greater than 0"),
        (["seed=1.5"], "seed=1.5: input should be a valid integer"),
        (["deterministic=3"], "deterministic=3: input should be a valid boolean"),
        (["precision.compute_dtype=float8"], "precision.compute_dtype"),
        (["model.moe.top_k=99"], "top_k=99 is more than num_experts=16: lower top_k or raise num_experts"),
        (["model.moe.first_k_dense_replace=4"], "leaves no MoE layer"),
        (["model.attention.qk_rope_head_dim=7"], "qk_rope_head_dim=7 must be even"),
        (
            ["model/attention=gqa_4x32", "model.attention.num_key_value_heads=3"],
            "num_key_value_heads=3 does not divide",
        ),
        (["schedule.warmup_fraction=0.9"], "overlap"),
        (["model.moe=null", "model.dense_twin_of_moe=equal_flops"], "needs moe settings"),
        (["data.vocab_size=100"], "vocab_size=100 is too small"),
        (["stop.tokens=0"], "stop.tokens=0: input should be greater than 0"),
        (["optimizer.lr=.nan"], "optimizer.lr"),
        (["model.hidden_size=???"], "model.hidden_size"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_a_mistake_is_one_line_with_the_key_and_the_reason(
    overrides: list[str], says: str, compose_run: Compose
) -> None:
    with pytest.raises(UserError) as error:
        compose_run(*overrides)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("attention", choices("model/attention"))
def test_any_model_takes_any_attention_of_the_group(attention: str, compose_run: Compose) -> None:
    found = compose_run("model=tiny", f"model/attention={attention}").model.attention
    kind = attention.split("_")[0]
    assert found.kind == ("mla" if kind == "mla" else "gqa")
    if isinstance(found, GQAConfig):
        of_heads = {"mha": found.num_attention_heads, "mqa": 1}
        assert found.num_key_value_heads == of_heads.get(kind, found.num_key_value_heads)


@pytest.mark.parametrize("router", choices("model/moe"))
def test_any_model_takes_any_router_of_the_group(router: str, compose_run: Compose) -> None:
    found = compose_run("model=small", f"model/moe={router}").model.moe
    assert found is not None
    assert found.num_experts == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.moe.n_group=3"], "n_group=3 does not divide num_experts=16"),
        (["model.moe.n_group=4", "model.moe.topk_group=5"], "topk_group=5 is more than n_group=4"),
        (["model.moe.n_group=8", "model.moe.topk_group=1"], "top_k=4 is more than the 2 experts"),
        (["model.moe.n_group=16", "model.moe.topk_group=8"], "group_score_top_k=2 is more than a group's 1"),
        (["model.moe.routing=expert_choice"], "needs capacity_factor"),
        (["model/moe=expert_choice", "model.moe.batch_loss_weight=0.1"], "batch_loss_weight does nothing"),
        (["model/mtp=depth_1", "model.mtp.depth=17"], "model.mtp.depth=17"),
        (["model/mtp=depth_2", "data.sequence_length=2"], "needs sequences longer"),
        (["model/rope_scaling=yarn", "model.rope_scaling.beta_slow=40.0"], "beta_slow=40.0 must be below beta_fast"),
        (["batch_ramp={start: 5, tokens: 1000}"], "batch_ramp.start=5 does not divide batch_size=16"),
        (["batch_ramp={start: 1, tokens: 1000000000}"], "more than a million steps"),
        (["init_from=a", "resume=b"], "give one of them"),
        (["model=dense_nano", "model.dense_twin_of_moe=true"], "dense_twin_of_moe"),
    ],
    ids=str,
)
def test_arms_that_cannot_be_built_are_refused_with_the_key(
    changes: list[str], message: str, compose_run: Compose
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        compose_run(*changes)


def test_a_dense_twin_has_the_flops_or_the_parameters_of_its_moe(compose_run: Compose) -> None:
    mixture = compose_run("model=tiny", "model/mtp=depth_1").model
    for twin, figure in (
        ("equal_flops", lambda m: training_flops_per_token(m, 256, 4096)),
        ("equal_params", lambda m: parameter_counts(m, 4096).total),
    ):
        dense = compose_run("model=tiny", "model/mtp=depth_1", f"model.dense_twin_of_moe={twin}").model.resolved()
        assert dense.moe is None
        assert figure(dense) == pytest.approx(figure(mixture), rel=5e-3), twin


def test_the_recipe_has_the_reports_figures_as_fractions_of_its_run(compose_run: Compose) -> None:
    """arXiv 2412.19437, section 4.2: tokens out of 14.8T, and what does not depend on size."""
    run = compose_run("experiment=deepseek_v3_recipe")
    tokens, ramp, moe, mtp, optimizer = run.stop.tokens, run.batch_ramp, run.model.moe, run.model.mtp, run.optimizer
    assert tokens is not None
    assert ramp is not None
    assert moe is not None
    assert mtp is not None
    assert isinstance(optimizer, AdamWConfig)
    assert run.batch_size / ramp.start == 15360 / 3072
    assert ramp.tokens / tokens == pytest.approx(0.469 / 14.8, rel=2e-3)
    assert (mtp.depth, mtp.loss_weight, mtp.late_loss_weight) == (1, 0.3, 0.1)
    assert mtp.late_from == pytest.approx(10 / 14.8, rel=2e-3)
    assert (moe.bias_update_speed, moe.sequence_loss_weight, moe.routed_scaling_factor) == (1e-3, 1e-4, 2.5)
    assert moe.bias_update_fraction == pytest.approx(14.3 / 14.8, rel=2e-3)
    assert (moe.n_group, moe.topk_group, moe.group_score_top_k, moe.scoring_func) == (8, 4, 2, "sigmoid")
    assert (optimizer.betas, optimizer.weight_decay, optimizer.max_grad_norm) == ((0.9, 0.95), 0.1, 1.0)
    assert run.model.initializer_range == 0.006
    assert run.schedule == compose_run("schedule=deepseek_v3").schedule


def test_whole_numbers_may_be_written_as_powers_of_ten(compose_run: Compose) -> None:
    assert compose_run("stop.tokens=1e6").stop.tokens == 1_000_000


def test_the_hash_names_what_decides_the_losses_and_nothing_else(compose_run: Compose) -> None:
    base = compose_run().config_hash()
    same = ["name=other", "run_dir=/elsewhere", "tracking=none", "checkpoint.every_steps=7", "data.cache_dir=/x"]
    different = ["seed=1", "model.moe.top_k=2", "optimizer.lr=2e-2", "data.sequence_length=128", "stop.steps=5"]
    assert {compose_run(o).config_hash() for o in same} == {base}
    assert len({base, *(compose_run(o).config_hash() for o in different)}) == 1 + len(different)


def test_all_keys_a_new_file_lacks_are_named_at_once() -> None:
    with pytest.raises(UserError, match=r"missing: vocab_size, .*attention.*rms_norm_eps.*: give each a value"):
        validated(ModelConfig, {"name": "mine", "hidden_size": 64, "num_hidden_layers": 2}, "mine.yaml")


def test_a_key_of_another_attention_says_which_attention_this_is(compose_run: Compose) -> None:
    with pytest.raises(UserError, match=r"attention.kv_lora_rank with kind=gqa: .*override attention"):
        compose_run("model/attention=gqa_4x32", "+model.attention.kv_lora_rank=4")
