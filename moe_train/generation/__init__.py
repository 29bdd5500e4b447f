"""Text from a trained model: plain with a cache, or several tokens a pass with drafts of its own MTP modules."""

from moe_train.generation.comparison import Comparison, compare
from moe_train.generation.decoding import Decoder, Generated, PlainDecoder, generate
from moe_train.generation.loading import TrainedModel, load_for_generation, load_trained
from moe_train.generation.speculative import SpeculativeDecoder

__all__ = [
    "Comparison",
    "Decoder",
    "Generated",
    "PlainDecoder",
    "SpeculativeDecoder",
    "TrainedModel",
    "compare",
    "generate",
    "load_for_generation",
    "load_trained",
]
