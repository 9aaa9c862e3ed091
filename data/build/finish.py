"""Writes the checkpoint that ships: 4-bit experts, 8-bit the rest, and its small files.

Puts tokenizer, chat template and generation settings beside the trained bfloat16
model and converts that folder into MLX's layout with this project's own `convert`.
The result has 36 MB instead of 112: run this on the training machine and copy its
output away before anything else.

Usage: python finish.py --work DIR --model DIR --out DIR
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from flashmoe_ref.convert import convert  # noqa: E402

TEMPLATE = ROOT / "data" / "reduced" / "chat_template.jinja"
SHARD_BYTES = 15 * 2**20
END, TURN_END = "<|endoftext|>", "<|im_end|>"


def write_json(path: Path, content: dict) -> None:
    """Indented, with a newline at the end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def generation_config(ids: dict[str, int]) -> dict:
    """Both ends of a text stop generation, as in Qwen3.5; mild sampling."""
    return {
        "do_sample": True,
        "eos_token_id": [ids[TURN_END], ids[END]],
        "pad_token_id": ids[END],
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.9,
    }


def tokenizer_config() -> dict:
    """What loaders of tokenizer.json need to know beside it."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "model_max_length": 4096,
        "pad_token": END,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }


def add_small_files(model: Path, tokenizer: Path) -> None:
    """Complete the trained model's folder."""
    shutil.copy(tokenizer, model / "tokenizer.json")
    shutil.copy(TEMPLATE, model / "chat_template.jinja")
    added = json.loads(tokenizer.read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    write_json(model / "generation_config.json", generation_config(ids))
    write_json(model / "tokenizer_config.json", tokenizer_config())


def main() -> None:
    """Complete and convert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    options = parser.parse_args()
    add_small_files(options.model, options.work / "tokenizer.json")
    convert(options.model, options.out, dense_bits=8, shard_bytes=SHARD_BYTES)


if __name__ == "__main__":
    main()
