"""The whole model: causality, caches, initialisation, gradients, and attention against a literal reading."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_train.config import GQAConfig, MLAConfig
from moe_train.model.attention import GQA, MLA, LayerCache
from moe_train.model.loss import IGNORE
from moe_train.model.rope import rotary_tables, rotate
from moe_train.model.transformer import Transformer

Q_LORA = "attention.q_lora_rank=12"
V_SMALLER = "attention.v_head_dim=8"


HEAD = "attention.head_dim=8"
# Every switch of the architecture that can stand alone. (Expert choice looks ahead, so it is not among them.)
ARMS = {
    "mla": [],
    "mla_q_lora": [Q_LORA],
    "mla_v_smaller": [V_SMALLER],
    "mha": ["attention=mha_4x32", HEAD],
    "gqa": ["attention=gqa_4x32", HEAD],
    "mqa": ["attention=mqa_4x32", HEAD],
    "qk_norm_per_head": ["attention=gqa_4x32", HEAD, "attention.qk_norm=per_head"],
    "qk_norm_all_heads": ["attention=gqa_4x32", HEAD, "attention.qk_norm=all_heads"],
    "yarn": ["rope_scaling=yarn", "rope_scaling.original_max_position_embeddings=4"],
    "dense": ["moe=null"],
    "groups": ["moe=group_limited", "moe.num_experts=8"],
    "softmax": ["moe=batch_loss"],
    "sequence_loss": ["moe=sequence_loss"],
    "switch": ["moe=switch", "moe.capacity_factor=0.5"],
    "gshard": ["moe=gshard", "moe.capacity_factor=0.5"],
    "no_shared": ["moe.num_shared_experts=0"],
    "mtp": ["mtp=depth_2"],
}


@pytest.fixture(params=ARMS)
def model(request: pytest.FixtureRequest, small_model: Callable[..., Transformer]) -> Transformer:
    return small_model(*ARMS[request.param])


def test_changing_a_token_changes_nothing_before_it(model: Transformer) -> None:
    tokens = torch.randint(0, 64, (1, 12))  # of several, where places are few, the second waits for the first
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 64
    before, after = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=1e-12, atol=1e-12)
    assert (after[:, 7:] - before[:, 7:]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("pieces", [[12], [5, 7], [1] * 12, [4, 1, 1, 6]], ids=str)
def test_cached_generation_gives_the_logits_of_one_whole_pass(model: Transformer, pieces: list[int]) -> None:
    model.eval()
    tokens = torch.randint(0, 64, (2, 12))
    caches = [LayerCache() for _ in model.blocks]
    parts = [model.logits(part, caches) for part in tokens.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model.logits(tokens), rtol=1e-10, atol=1e-10)


def test_the_mla_cache_holds_one_latent_and_one_rotary_key_a_token(small_model: Callable[..., Transformer]) -> None:
    model = small_model()
    caches = [LayerCache() for _ in model.blocks]
    model.logits(torch.randint(0, 64, (1, 5)), caches)
    assert caches[0].held is not None
    assert sum(t.numel() for t in caches[0].held) == 5 * (16 + 8)


def test_losses_are_sums_over_tokens_so_micro_batches_add_up(model: Transformer) -> None:
    if model.config.moe is not None and (model.config.moe.batch_loss_weight or model.config.moe.capacity_factor):
        model.eval()  # balance over a batch, and places in it, are those of the batch that is there
    tokens, targets = torch.randint(0, 64, (2, 4, 10))
    whole = model(tokens, targets)
    halves = [model(t, y) for t, y in zip(tokens.split(2), targets.split(2), strict=True)]
    torch.testing.assert_close(whole.objective, halves[0].objective + halves[1].objective, rtol=1e-10, atol=0)
    torch.testing.assert_close(whole.nll, halves[0].nll + halves[1].nll, rtol=1e-10, atol=0)
    assert torch.equal(whole.counts_le, halves[0].counts_le + halves[1].counts_le)


# Balance over a batch, and places in it, are those of the micro-batch that is there.
CUT_MATTERS = {"batch_loss": ["moe=batch_loss"], "switch": ARMS["switch"], "expert_choice": ["moe=expert_choice"]}


@pytest.mark.parametrize("arm", CUT_MATTERS)
def test_batch_balance_and_capacity_follow_the_micro_batch(arm: str, small_model: Callable[..., Transformer]) -> None:
    model = small_model(*CUT_MATTERS[arm])
    tokens, targets = torch.randint(0, 64, (2, 4, 10), generator=torch.Generator().manual_seed(0))
    whole = model(tokens, targets).objective
    cut = sum(model(t, y).objective for t, y in zip(tokens.split(1), targets.split(1), strict=True))
    assert abs(cut - whole) > 1e-7 * whole


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Three sequences, the second padded after four tokens, the third padding alone."""
    tokens, targets = torch.randint(0, 64, (2, 3, 10), generator=torch.Generator().manual_seed(0))
    targets[1, 4:] = IGNORE
    targets[2] = IGNORE
    return tokens, targets


@pytest.mark.parametrize("arm", [*ARMS, "expert_choice"])
def test_what_stands_in_padding_changes_no_loss_no_load_and_no_gradient(
    arm: str, small_model: Callable[..., Transformer]
) -> None:
    model = small_model(*ARMS.get(arm, ["moe=expert_choice"]))
    tokens, targets = padded_batch()
    results = []
    for padding in (0, 7):
        model.zero_grad()
        losses = model(tokens.masked_fill(targets == IGNORE, padding), targets, mtp_weight=0.3)
        losses.objective.backward()
        results.append([*losses, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("arm", ["mla", "groups", "sequence_loss", "mtp"])
def test_a_padded_batch_has_the_losses_and_loads_of_its_tokens_alone(
    arm: str, small_model: Callable[..., Transformer]
) -> None:
    model = small_model(*ARMS[arm], "moe.router_z_loss_weight=0.01")
    tokens, targets = padded_batch()
    padded = model(tokens, targets)
    alone = [model(tokens[:1], targets[:1]), model(tokens[1:2, :4], targets[1:2, :4])]
    assert torch.equal(padded.counts_le, sum(losses.counts_le for losses in alone))
    assert padded.counts_le[0].sum() == 14 * 2
    torch.testing.assert_close(padded.nll, sum(losses.nll for losses in alone), rtol=1e-10, atol=0)
    if arm != "mtp":  # whose losses are brought to the length of the sequence
        torch.testing.assert_close(padded.auxiliary, sum(losses.auxiliary for losses in alone), rtol=1e-10, atol=0)


@pytest.mark.parametrize("arm", [*ARMS, "expert_choice"])
def test_every_parameter_gets_a_gradient_that_finite_differences_confirm(
    arm: str, small_model: Callable[..., Transformer]
) -> None:
    model = small_model(*ARMS.get(arm, ["moe=expert_choice"]))
    tokens, targets = torch.randint(0, 64, (2, 2, 6))

    def objective() -> torch.Tensor:
        value: torch.Tensor = model(tokens, targets, mtp_weight=0.3).objective
        return value

    objective().backward()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter += 1e-6 * direction
            above = objective()
            parameter -= 2e-6 * direction
            below = objective()
            parameter += 1e-6 * direction
        slope = ((above - below) / 2e-6).item()
        assert slope == pytest.approx((parameter.grad * direction).sum().item(), rel=2e-4, abs=1e-5), name


def test_recomputing_activations_changes_no_bit_and_counts_every_token_once(model: Transformer) -> None:
    tokens, targets = torch.randint(0, 64, (2, 2, 6))
    results = []
    for recompute in (False, True):
        model.activation_checkpointing = recompute
        model.zero_grad()
        losses = model(tokens, targets, mtp_weight=0.3)
        losses.objective.backward()
        results.append([*losses, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_experts_that_choose_tokens_see_later_ones(small_model: Callable[..., Transformer]) -> None:
    model = small_model("moe=expert_choice")
    tokens = torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(0))
    differences = []
    for token in range(64):
        changed = tokens.clone()
        changed[0, 11] = token
        differences.append((model.logits(changed) - model.logits(tokens))[0, :11].abs().max().item())
    assert max(differences) > 1e-3  # why its losses are optimistic and generation is refused


def test_counts_hold_every_token_top_k_times_in_every_moe_layer(small_model: Callable[..., Transformer]) -> None:
    counts = small_model()(*torch.randint(0, 64, (2, 3, 5))).counts_le
    assert counts.shape == (2, 8)
    assert counts.sum(1).tolist() == [3 * 5 * 2] * 2


def test_initialisation_depends_on_the_seed_alone(small_model: Callable[..., Transformer]) -> None:
    torch.manual_seed(5)
    first = small_model(seed=1)
    torch.manual_seed(6)
    same, other = small_model(seed=1), small_model(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    assert first.embedding.weight.std().item() == pytest.approx(0.2, rel=0.1)


def test_dropout_acts_in_training_only(small_model: Callable[..., Transformer]) -> None:
    model = small_model("dropout=0.5")
    tokens = torch.randint(0, 64, (1, 6))
    assert not torch.equal(model.logits(tokens), model.logits(tokens))
    model.eval()
    assert torch.equal(model.logits(tokens), model.logits(tokens))


def test_mla_equals_its_equations_written_out_for_one_head_at_a_time() -> None:
    config = MLAConfig("mla", 2, 6, None, 4, 4, 5)
    made = MLA(config, 12, 1e-6, 8**-0.5).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x = torch.randn(1, 7, 12, dtype=torch.float64)
    cos, sin = rotary_tables(torch.arange(7), 10000.0 ** (-torch.arange(0, 4, 2) / 4))

    # arXiv 2405.04434, equations 9 to 19.
    down = x[0] @ made.kv_a_proj.weight.t()
    latent, k_rope = down[:, :6], rotate(down[:, 6:], cos, sin)
    latent = latent / (latent.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * made.kv_a_norm.weight
    heads = []
    for h in range(2):
        q = x[0] @ made.q_proj.weight[8 * h : 8 * h + 8].t()
        kv = latent @ made.kv_b_proj.weight[9 * h : 9 * h + 9].t()
        q = torch.cat((q[:, :4], rotate(q[:, 4:], cos, sin)), -1)
        k = torch.cat((kv[:, :4], k_rope), -1)
        scores = (q @ k.t() / 8**0.5).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ kv[:, 4:])
    expected = torch.cat(heads, -1) @ made.o_proj.weight.t()
    torch.testing.assert_close(made(x, (cos, sin))[0], expected, rtol=1e-6, atol=1e-6)


def test_gqa_with_all_heads_repeated_is_multi_head_attention() -> None:
    few = GQA(GQAConfig("gqa", 4, 2, 8, None), 16, 1e-6, 0.3)
    many = GQA(GQAConfig("gqa", 4, 4, 8, None), 16, 1e-6, 0.3)
    for parameter in few.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    many.q_proj, many.o_proj = few.q_proj, few.o_proj
    many.k_proj.weight.data = few.k_proj.weight.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1).data
    many.v_proj.weight.data = few.v_proj.weight.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1).data
    rotary = rotary_tables(torch.arange(6), 10000.0 ** (-torch.arange(0, 8, 2) / 8))
    x = torch.randn(2, 6, 16)
    torch.testing.assert_close(few(x, rotary), many(x, rotary), rtol=1e-5, atol=1e-5)
