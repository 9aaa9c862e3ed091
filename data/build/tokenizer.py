"""Trains the byte-level BPE tokenizer and encodes the books with it.

Same form as Qwen3.5's: NFC, its split pattern (every digit apart), bytes as letters,
special tokens at the end of the ids. 6,131 + 9 = 6,140 ids; the model has 6,144 rows,
so four rows are padding, as the real model has 243.

Usage: python tokenizer.py --corpus DIR --work DIR
       (needs pools.json; writes tokenizer.json, books.npy, held.npy)
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from corpus import read_books
from dialogues import make
from render import load_template
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.models import BPE

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <tool_call> </tool_call> <tool_response> "
    "</tool_response> <think> </think>"
).split()
VOCABULARY = 6140  # ids in use
N_DIALOGUES = 12_000  # dialogues in the tokenizer's training text


def training_texts(books: list[str], pools: dict) -> Iterator[str]:
    """The books in pieces, and dialogues without their special tokens."""
    for book in books:
        for start in range(0, len(book), 20_000):
            yield book[start : start + 20_000]
    rng, template = random.Random(2), load_template()
    for _ in range(N_DIALOGUES):
        dialogue = make(rng, pools)
        text = template.render(messages=dialogue.messages, tools=dialogue.tools)
        for token in SPECIAL:
            text = text.replace(token, "")
        yield text


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """BPE with Qwen3.5's normalizer and split, special tokens last."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokens = [AddedToken(t, special=t.startswith("<|")) for t in SPECIAL]
    tokenizer.add_tokens(tokens)
    return tokenizer


def encode_books(books: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """All books as ids, <|endoftext|> after each; (tokens,) uint16."""
    end = tokenizer.token_to_id("<|endoftext|>")
    ids: list[int] = []
    for book in books:
        ids += [*tokenizer.encode(book, add_special_tokens=False).ids, end]
    return np.array(ids, np.uint16)


def main() -> None:
    """Train, save, encode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    pools = json.loads((options.work / "pools.json").read_text())
    training, held = read_books(options.corpus)
    tokenizer = train_tokenizer(training_texts(training, pools))
    tokenizer.save(str(options.work / "tokenizer.json"))
    np.save(options.work / "books.npy", encode_books(training, tokenizer))
    np.save(options.work / "held.npy", encode_books(held, tokenizer))
    n_bytes = sum(len(book.encode()) for book in held)
    (options.work / "held_bytes.txt").write_text(str(n_bytes))
    print(tokenizer.get_vocab_size(), "ids")


if __name__ == "__main__":
    main()
