"""The text the tests train on: made up, regular enough to be learned, the same everywhere."""

from __future__ import annotations

from pathlib import Path


def write_corpus(folder: Path) -> Path:
    """400 documents of 60 words in `folder`/corpus.jsonl, big enough for both splits; returns the folder."""
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "while",
        "seven",
        "wizards",
        "brew",
        "tea",
    ]
    lines = []
    for document in range(400):
        state = document * 7919 + 13
        text = []
        for _ in range(60):
            state = (state * 1103515245 + 12345) % 2**31
            text.append(words[state // 65536 % len(words)])
        lines.append(" ".join(text) + ".")
    (folder / "corpus.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    return folder
