"""Text with a cache: the text of no cache, whatever the attention, and what the cache costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_train.config import ModelConfig
from moe_train.cost.memory import cache_elements_per_token
from moe_train.data.tokenizer import bytes_tokenizer
from moe_train.generation import PlainDecoder, generate
from moe_train.model.attention import LayerCache
from moe_train.model.transformer import Transformer

LATENT, KEYS = 16, 8  # of the small MLA model
GQA = ["attention=gqa_4x32", "attention.num_attention_heads=4", "attention.head_dim=8"]
YARN = ["rope_scaling=yarn", "rope_scaling.factor=4", "rope_scaling.original_max_position_embeddings=16"]
KINDS = {
    "mla": [],
    "mla_q_lora": ["attention.q_lora_rank=12"],
    "mla_yarn": YARN,
    "gqa": [*GQA, "attention.num_key_value_heads=2"],
    "mqa": [*GQA, "attention.num_key_value_heads=1"],
    "mha_qk_norm": [*GQA, "attention.num_key_value_heads=4", "attention.qk_norm=per_head"],
    "mha_qk_norm_of_all_heads": [*GQA, "attention.num_key_value_heads=4", "attention.qk_norm=all_heads"],
    "gqa_yarn": [*GQA, "attention.num_key_value_heads=2", *YARN],
    "dense": ["moe=null"],
}


@pytest.fixture(scope="module")
def models() -> dict[str, Transformer]:
    return {}


@pytest.fixture(params=KINDS)
def model(
    request: pytest.FixtureRequest, models: dict[str, Transformer], small_model: Callable[..., Transformer]
) -> Transformer:
    """The small model with each kind of attention, made once."""
    if request.param not in models:
        models[request.param] = small_model(*KINDS[request.param]).eval()
    return models[request.param]


def caches_of(model: Transformer) -> list[LayerCache]:
    return [LayerCache() for _ in model.blocks]


def read(model: Transformer, tokens: Tensor, caches: list[LayerCache], chunk: int) -> Tensor:
    return torch.cat([model.logits(part, caches) for part in tokens.split(chunk, dim=1)], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_reading_in_chunks_gives_the_logits_of_one_whole_pass(model: Transformer, chunk: int) -> None:
    tokens = torch.randint(0, 64, (2, 21))
    torch.testing.assert_close(
        read(model, tokens, caches_of(model), chunk), model.logits(tokens), rtol=1e-10, atol=1e-10
    )


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3])
def test_what_a_truncated_cache_forgot_was_never_there(model: Transformer, chunk: int) -> None:
    kept, dropped, after = torch.randint(0, 64, (3, 1, 7))
    caches, untouched = caches_of(model), caches_of(model)
    read(model, torch.cat((kept, dropped), dim=1), caches, chunk)
    for cache in caches:
        cache.truncate(7)
    read(model, kept, untouched, chunk)
    torch.testing.assert_close(
        read(model, after, caches, chunk), read(model, after, untouched, chunk), rtol=1e-10, atol=1e-10
    )
    assert [c.bytes for c in caches] == [c.bytes for c in untouched]


@torch.no_grad()
def test_greedy_tokens_are_those_of_reading_everything_again_for_each(model: Transformer) -> None:
    tokens = [3, 1, 4, 1, 5]
    expected = list(tokens)
    for _ in range(20):
        expected.append(int(model.logits(torch.tensor([expected]))[0, -1].argmax()))
    assert list(PlainDecoder(model).tokens(tokens, 20)) == expected[5:]


def test_sampling_follows_the_seed_and_the_softmax_of_the_scores(small_model: Callable[..., Transformer]) -> None:
    model = small_model("initializer_range=0.5").eval()

    def sampled(seed: int, temperature: float = 1.0) -> list[int]:
        return list(PlainDecoder(model, temperature, seed).tokens([7], 12))

    assert sampled(1) == sampled(1) != sampled(2)
    assert sampled(1, temperature=1e-4) == list(PlainDecoder(model).tokens([7], 12))
    with torch.no_grad():
        expected = model.logits(torch.tensor([[7]]))[0, 0].softmax(-1)
    drawn = torch.bincount(
        torch.tensor([next(PlainDecoder(model, 1.0, seed).tokens([7], 1)) for seed in range(600)]), minlength=64
    )
    # The mean distance of 600 draws from their distribution is below sqrt(64 / 600) / 2 of its mass.
    assert (drawn / 600 - expected).abs().sum() < (64 / 600) ** 0.5


@pytest.fixture
def speaker(model_config: Callable[..., ModelConfig]) -> Callable[..., Transformer]:
    """A one-layer model over bytes and the end of a text, which says the byte after the one it reads."""

    def make(ends_after: int | None = None) -> Transformer:
        config = model_config(
            "nano",
            "num_hidden_layers=1",
            "hidden_size=512",
            "moe=null",
            "tie_word_embeddings=false",
        )
        model = Transformer(config, vocab_size=320).eval()
        model.initialise(0)
        for parameter in model.blocks.parameters():
            parameter.data.zero_()  # the residual stream is the embedding
        model.embedding.weight.data = torch.eye(320, 512)
        assert model.lm_head is not None
        model.lm_head.weight.data = torch.eye(320, 512).roll(1, 0)
        if ends_after is not None:
            model.lm_head.weight.data[256] = 2 * model.embedding.weight.data[ends_after]
        return model

    return make


def test_generation_ends_at_the_limit_and_counts_what_it_did(speaker: Callable[..., Transformer]) -> None:
    result = generate(PlainDecoder(speaker()), bytes_tokenizer(), "ab", 4)
    assert result.text == "abcdef"
    assert (result.new_tokens, result.forward_passes) == (4, 4)


def test_generation_ends_at_the_end_of_text_which_is_not_part_of_the_text(speaker: Callable[..., Transformer]) -> None:
    result = generate(PlainDecoder(speaker(ends_after=ord("d"))), bytes_tokenizer(), "ab", 40)
    assert result.text == "abcd"
    assert (result.new_tokens, result.forward_passes) == (2, 3)


def test_an_empty_prompt_begins_after_an_end_of_text(speaker: Callable[..., Transformer]) -> None:
    model = speaker()
    assert model.lm_head is not None
    model.lm_head.weight.data[ord("x")] = 2 * model.embedding.weight.data[256]
    assert generate(PlainDecoder(model), bytes_tokenizer(), "", 3).text == "xyz"


def test_the_cache_is_counted_in_elements_a_token_and_bytes(small_model: Callable[..., Transformer]) -> None:
    tokenizer = bytes_tokenizer()
    for model, a_layer in (
        (small_model(dtype=torch.float32), LATENT + KEYS),
        (small_model(*KINDS["gqa"], dtype=torch.float32), 2 * 2 * 8),
        (small_model(*KINDS["mqa"], dtype=torch.float32), 2 * 1 * 8),
    ):
        result = generate(PlainDecoder(model.eval()), tokenizer, "\x01\x02\x03", 5)
        assert result.cache_elements_per_token == 3 * a_layer == cache_elements_per_token(model.config)
        assert result.cache_bytes == (3 + 5 - 1) * 3 * a_layer * 4  # the last token is not read
