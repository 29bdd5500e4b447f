"""What a dollar bought: bits per byte that a run took off the eight of raw text."""

from __future__ import annotations

# A byte of raw text is 8 bits: the same yardstick for every corpus and tokenizer.
RAW_BITS_PER_BYTE = 8.0


def bits_per_byte_a_dollar(bits_per_byte: float | None, usd: float | None) -> float | None:
    """`usd`: the whole bill. None where either is not known or nothing was paid."""
    return None if bits_per_byte is None or not usd else (RAW_BITS_PER_BYTE - bits_per_byte) / usd
