"""Speculative decoding: the text of plain greedy decoding, whatever the drafts, in as few passes as they allow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_train.config import ModelConfig
from moe_train.data.tokenizer import bytes_tokenizer
from moe_train.errors import UserError
from moe_train.generation import PlainDecoder, SpeculativeDecoder, generate
from moe_train.generation.speculative import Drafter
from moe_train.model.attention import LayerCache
from moe_train.model.transformer import Transformer

KINDS = {
    "mla": [],
    "mla_q_lora": ["attention.q_lora_rank=12"],
    "gqa": ["attention=gqa_4x32", "attention.head_dim=8"],
    "dense": ["moe=null"],
    "dense_gqa": ["moe=null", "attention=gqa_4x32", "attention.head_dim=8"],
}


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, int, torch.dtype], Transformer]:
    return {}


@pytest.fixture
def made(
    models: dict[tuple[str, int, torch.dtype], Transformer], small_model: Callable[..., Transformer]
) -> Callable[..., Transformer]:
    """The small model of a kind with `depth` MTP modules, its weights drawn anew."""

    def make(kind: str, depth: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Transformer:
        key = (kind, depth, dtype)
        if key not in models:
            models[key] = small_model(
                *KINDS[kind], "tie_word_embeddings=false", "mtp=depth_1", f"mtp.depth={depth}", dtype=dtype
            ).eval()
        models[key].initialise(seed)
        return models[key]

    return make


def agreeable(model: Transformer) -> None:
    """Make the model and its modules agree about half of the time: the last token decides nearly everything."""
    model.embedding.weight.data *= 40
    for module in model.mtp:
        embedding_alone = torch.eye(model.config.hidden_size, 2 * model.config.hidden_size)
        module.join_proj.weight.data = 8 * embedding_alone.to(module.join_proj.weight)


prompts = st.lists(st.integers(0, 63), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(KINDS)),
    depth=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    prompt=prompts,
    limit=st.integers(1, 24),
    agree=st.booleans(),
)
def test_its_tokens_are_those_of_plain_greedy_decoding(
    made: Callable[..., Transformer],
    kind: str,
    depth: int,
    seed: int,
    prompt: list[int],
    limit: int,
    agree: bool,
) -> None:
    model = made(kind, depth, seed)
    if agree:
        agreeable(model)
    decoder = SpeculativeDecoder(model)
    assert list(decoder.tokens(prompt, limit)) == list(PlainDecoder(model).tokens(prompt, limit))
    # Every pass gives one token of its own and the drafts it accepted.
    assert decoder.forward_passes + sum(decoder.accepted) == limit
    assert all(a <= d for a, d in zip(decoder.accepted, decoder.drafted, strict=True))
    assert decoder.main_caches[0].length == len(prompt) + limit - 1


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("depth", [1, 2])
def test_the_same_holds_in_single_precision(made: Callable[..., Transformer], kind: str, depth: int) -> None:
    for seed in range(2):
        model = made(kind, depth, seed, torch.float32)
        prompt = torch.randint(0, 64, (5,), generator=torch.Generator().manual_seed(seed)).tolist()
        assert list(SpeculativeDecoder(model).tokens(prompt, 30)) == list(PlainDecoder(model).tokens(prompt, 30))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(KINDS)),
    depth=st.integers(1, 3),
    prompt=prompts,
    steps=st.lists(st.integers(1, 4), min_size=1, max_size=5),
)
def test_drafts_with_caches_are_those_of_modules_that_read_everything_anew(
    made: Callable[..., Transformer], kind: str, depth: int, prompt: list[int], steps: list[int]
) -> None:
    model = made(kind, depth)
    generator = torch.Generator().manual_seed(len(prompt))
    drafter, caches = Drafter(model), [LayerCache() for _ in model.blocks]
    known = list(prompt)
    with torch.no_grad():
        for step in [1, *steps]:  # the first call comes after the prompt and one token
            unread = known[caches[0].length :]
            known += torch.randint(0, 64, (step,), generator=generator).tolist()
            unread += known[caches[0].length + len(unread) : -1]
            hidden, _ = model.hidden(torch.tensor([unread]), caches)
            assert drafter.draft(hidden, known, depth) == drafts_without_a_cache(model, known)


def drafts_without_a_cache(model: Transformer, known: list[int]) -> list[int]:
    """As in training: module k at position i reads the stage before at i and token i + k."""
    hidden, _ = model.hidden(torch.tensor([known[:-1]]))
    drafts: list[int] = []
    for depth, module in enumerate(model.mtp, start=1):
        following = torch.tensor([(known + drafts)[depth:]])
        hidden = hidden[:, : following.shape[1]]
        hidden = module(hidden, model.embedding(following), model.rotary(0, hidden.shape[1], hidden.device)).hidden_btd
        drafts.append(int(model.scores(hidden)[0, -1].argmax()))
    return drafts


def test_drafts_that_are_always_right_give_depth_plus_one_tokens_a_pass(speaker: Callable[..., Transformer]) -> None:
    for depth in (1, 2, 3):
        decoder = SpeculativeDecoder(speaker(depth))
        result = generate(decoder, bytes_tokenizer(), "A", 1 + 4 * (depth + 1))
        assert result.text == "".join(chr(65 + i) for i in range(2 + 4 * (depth + 1)))
        assert result.forward_passes == 1 + 4
        assert decoder.accepted == decoder.drafted == [4] * depth


def test_drafts_that_are_always_wrong_cost_passes_but_change_nothing(speaker: Callable[..., Transformer]) -> None:
    model = speaker(2)
    for module in model.mtp:
        module.norm.weight.data.neg_()
    decoder = SpeculativeDecoder(model)
    result = generate(decoder, bytes_tokenizer(), "A", 9)
    assert result.text == "ABCDEFGHIJ"
    assert result.forward_passes == 9
    assert decoder.accepted == [0, 0]
    assert decoder.drafted == [7, 6]  # none where one more token is wanted, one where two are


def test_it_stops_at_the_end_of_text_also_inside_a_draft(speaker: Callable[..., Transformer]) -> None:
    for ends_after in "ABCDEFG":
        model = speaker(3, ends_after=ord(ends_after))
        result = generate(SpeculativeDecoder(model), bytes_tokenizer(), "A", 50)
        assert result.text == generate(PlainDecoder(model), bytes_tokenizer(), "A", 50).text
        assert result.text[-1] == ends_after
        assert result.new_tokens == len(result.text) - 1


@pytest.mark.parametrize("limit", range(1, 9))
def test_it_stops_exactly_at_the_limit(speaker: Callable[..., Transformer], limit: int) -> None:
    assert generate(SpeculativeDecoder(speaker(2)), bytes_tokenizer(), "A", limit).new_tokens == limit


def test_the_caches_of_the_modules_are_counted_too(small_model: Callable[..., Transformer]) -> None:
    model = small_model("mtp=depth_1", dtype=torch.float32).eval()
    result = generate(SpeculativeDecoder(model), bytes_tokenizer(), "\x01\x02\x03", 5)
    assert result.cache_elements_per_token == 4 * (16 + 8)


def test_a_model_without_modules_is_refused_with_the_way_to_get_one(small_model: Callable[..., Transformer]) -> None:
    with pytest.raises(UserError, match=r"speculative=true .*model/mtp=depth_1"):
        SpeculativeDecoder(small_model())


@pytest.fixture
def speaker(model_config: Callable[..., ModelConfig]) -> Callable[..., Transformer]:
    """A model over bytes and the end of a text that says the byte after the one it reads, as do its MTP modules."""

    def make(depth: int, ends_after: int | None = None) -> Transformer:
        config = model_config(
            "nano",
            "num_hidden_layers=1",
            "hidden_size=512",
            "moe=null",
            "tie_word_embeddings=false",
            "mtp=depth_1",
            f"mtp.depth={depth}",
        )
        model = Transformer(config, vocab_size=320).eval()
        model.initialise(0)
        for parameter in [*model.blocks.parameters(), *(p for m in model.mtp for p in m.block.parameters())]:
            parameter.data.zero_()  # the residual stream is what enters it
        model.embedding.weight.data = torch.eye(320, 512)
        for module in model.mtp:  # the embedding alone
            module.join_proj.weight.data = torch.eye(512, 1024)
        assert model.lm_head is not None
        model.lm_head.weight.data = torch.eye(320, 512).roll(1, 0)
        if ends_after is not None:
            model.lm_head.weight.data[256] = 2 * model.embedding.weight.data[ends_after]
        return model

    return make
