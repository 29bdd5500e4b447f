"""Text to batches: corpus, tokenizer, packed token files, and batches that are a function of seed and step."""
