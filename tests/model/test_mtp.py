"""Multi-token prediction read literally, one position and one depth at a time, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from moe_train.config import MTPConfig
from moe_train.model.loss import IGNORE
from moe_train.model.mtp import MTPModule
from moe_train.model.transformer import Transformer

Make = Callable[..., Transformer]


def losses_by_depth(model: Transformer, tokens: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    """arXiv 2412.19437, equations 21 to 24: token i + k + 1 from h_i^(k-1) and the embedding of token i + k."""
    hidden, _ = model.hidden(tokens)
    losses = []
    for k, module in enumerate(model.mtp, start=1):
        assert isinstance(module, MTPModule)
        length = tokens.shape[1] - k
        joined = []
        for i in range(length):
            halves = module.embedding_norm(model.embedding(tokens[:, i + k])), module.hidden_norm(hidden[:, i])
            joined.append(module.join_proj(torch.cat(halves, -1)))
        hidden = module.norm(module.block(torch.stack(joined, 1), model.rotary(0, length, tokens.device)).hidden_btd)
        logits = hidden @ model.head_weight.t()
        flat, wanted = logits.flatten(0, 1), targets[:, k:].flatten()
        losses.append(F.cross_entropy(flat, wanted, reduction="sum", ignore_index=IGNORE))
    return losses


@pytest.mark.parametrize("overrides", [[], ["moe=null"], ["tie_word_embeddings=false"]], ids=str)
def test_each_module_predicts_one_token_further_than_the_one_before(overrides: list[str], small_model: Make) -> None:
    model = small_model("mtp=depth_2", "moe.sequence_loss_weight=0", *(overrides or []))
    tokens, targets = torch.randint(0, 64, (2, 2, 9))
    targets[1, 6:] = IGNORE
    expected = losses_by_depth(model, tokens, targets)
    found = model(tokens, targets, mtp_weight=0.3)
    torch.testing.assert_close(found.mtp_nll_k, torch.stack(expected), rtol=1e-10, atol=0)
    assert found.mtp_targets_k.tolist() == [8 + 5, 7 + 4]
    torch.testing.assert_close(found.objective, found.nll + 0.3 * sum(expected) / 2, rtol=1e-10, atol=0)


def test_the_main_loss_is_that_of_the_model_without_it(small_model: Make) -> None:
    plain, longer = small_model(), small_model("mtp=depth_1")
    longer.load_state_dict(plain.state_dict(), strict=False)
    tokens, targets = torch.randint(0, 64, (2, 2, 9))
    torch.testing.assert_close(longer(tokens, targets).nll, plain(tokens, targets).nll, rtol=0, atol=0)
    # Drawn after the rest, so that a seed means the same main model.
    assert all(torch.equal(p, dict(longer.named_parameters())[name]) for name, p in small_model().named_parameters())


def test_embedding_and_head_are_the_main_models_own(small_model: Make) -> None:
    model = small_model("mtp=depth_1", "tie_word_embeddings=false")
    assert not [name for name, _ in model.mtp.named_parameters() if "embedding.weight" in name or "lm_head" in name]
    tokens, targets = torch.randint(0, 64, (2, 2, 9))
    losses = model(tokens, targets, mtp_weight=1.0)
    (losses.objective - losses.nll).backward()  # what is left of the objective is the module's
    assert model.embedding.weight.grad is not None
    assert model.embedding.weight.grad.abs().sum() > 0
    assert model.head_weight.grad is not None


@pytest.mark.parametrize("attention", [[], ["attention=gqa_4x32", "attention.head_dim=8"]], ids=["mla", "gqa"])
def test_changing_a_token_changes_no_prediction_made_without_it(attention: list[str], small_model: Make) -> None:
    model = small_model("mtp=depth_2", *attention)
    tokens = torch.randint(0, 64, (1, 12))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 64

    def scores(tokens: torch.Tensor) -> list[torch.Tensor]:
        hidden, _ = model.hidden(tokens)
        found = []
        for k, module in enumerate(model.mtp, start=1):
            rotary = model.rotary(0, tokens.shape[1] - k, tokens.device)
            hidden = module(hidden[:, :-1], model.embedding(tokens[:, k:]), rotary).hidden_btd
            found.append(model.scores(hidden))
        return found

    for k, (before, after) in enumerate(zip(scores(tokens), scores(changed), strict=True), start=1):
        torch.testing.assert_close(after[:, : 7 - k], before[:, : 7 - k], rtol=1e-12, atol=1e-12)
        assert (after[:, 7 - k :] - before[:, 7 - k :]).abs().amax(-1).min() > 1e-6


def test_its_weight_is_the_first_up_to_a_point_of_the_run_and_the_late_one_from_there() -> None:
    config = MTPConfig(depth=1, loss_weight=0.3, late_loss_weight=0.1, late_from=0.676)
    assert [config.weight_at(p) for p in (0.0, 0.67599, 0.676, 1.0)] == [0.3, 0.3, 0.1, 0.1]


def test_its_experts_are_counted_and_balanced_with_the_others(small_model: Make) -> None:
    model = small_model("mtp=depth_2")
    counts = model(*torch.randint(0, 64, (2, 3, 9))).counts_le
    assert counts.sum(1).tolist() == [3 * 9 * 2] * 2 + [3 * 8 * 2, 3 * 7 * 2]
    assert len(model.routers()) == len(counts) == model.config.num_routers


def test_a_modules_residual_stream_is_as_wide_as_the_main_models_in_bf16(small_model: Make) -> None:
    model = small_model("mtp=depth_1").float()
    streams = []
    for block in (model.blocks[0], model.mtp[0].block):
        block.register_forward_pre_hook(lambda _, args: streams.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(*torch.randint(0, 64, (2, 2, 9)), mtp_weight=0.3)
    assert streams == [torch.float32, torch.float32]
