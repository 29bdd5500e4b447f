"""Speculative decoding against plain greedy decoding: a speed-up is a measured ratio or it is not stated."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import UserError
from moe_train.generation.decoding import Generated, PlainDecoder, generate
from moe_train.generation.speculative import SpeculativeDecoder
from moe_train.model.transformer import Transformer

_PAIRS = 3
_WARM_UP_TOKENS = 8  # the first passes of a process pay for what later ones find ready


class Comparison(NamedTuple):
    speculative: Generated  # of the pair with the median ratio, as is greedy
    decoder: SpeculativeDecoder
    greedy: Generated
    speed_ups: list[float]  # speculative over greedy tokens a second, of each pair, in ascending order
    same_text: bool  # rounding can turn a near tie of two tokens the other way

    @property
    def speed_up(self) -> float:
        return statistics.median_low(self.speed_ups)


def compare(model: Transformer, tokenizer: Tokenizer, prompt: str, max_new_tokens: int) -> Comparison:
    """The same continuation both ways, three times in turn after a warm-up. Raises UserError without MTP modules."""
    for decoder in (SpeculativeDecoder(model), PlainDecoder(model)):
        generate(decoder, tokenizer, prompt, min(_WARM_UP_TOKENS, max_new_tokens))
    pairs = []
    for _ in range(_PAIRS):
        drafting = SpeculativeDecoder(model)
        speculative = generate(drafting, tokenizer, prompt, max_new_tokens)
        greedy = generate(PlainDecoder(model), tokenizer, prompt, max_new_tokens)
        pairs.append((greedy.seconds / speculative.seconds, speculative, drafting, greedy))
    if not pairs[0][1].new_tokens:
        raise UserError("compare=true: the model ends the text at once, nothing is compared: give another prompt")
    pairs.sort(key=lambda pair: pair[0])
    _, speculative, drafting, greedy = pairs[len(pairs) // 2]
    return Comparison(
        speculative, drafting, greedy, [pair[0] for pair in pairs], same_text=speculative.text == greedy.text
    )
