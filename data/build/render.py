"""Turns dialogues into text with the chat template, and text into token rows.

The text of a training dialogue is what data/reduced/chat_template.jinja renders, so
the model is used exactly as it was trained. Loss weights follow from the tokens: the
answer is what stands between an opened assistant turn (its empty think block) and
<|im_end|>. Dialogues are packed whole into rows of 512 tokens.
"""

import json
import random
from pathlib import Path

import jinja2.sandbox
import numpy as np
from dialogues import make
from tokenizers import Tokenizer

REDUCED = Path(__file__).parent.parent / "reduced"
PADDING, PROMPT, ANSWER = 0, 1, 2
OPENING = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def load_template(path: Path = REDUCED / "chat_template.jinja") -> jinja2.Template:
    """The compiled template, with the helpers that chat clients provide."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: object, **options: object) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    return environment.from_string(path.read_text())


def mark_answers(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """ANSWER for the tokens that the assistant says, PROMPT for the others.

    An answer begins two tokens after </think> is opened (`</think>`, blank line) and
    ends with <|im_end|>, which belongs to it.
    """
    think_end = tokenizer.token_to_id("</think>")
    turn_end = tokenizer.token_to_id("<|im_end|>")
    marks, i = [PROMPT] * len(ids), 0
    while i < len(ids):
        if ids[i] == think_end:
            i += 2
            while ids[i] != turn_end:
                marks[i] = ANSWER
                i += 1
            marks[i] = ANSWER
        i += 1
    return marks


def pack_rows(
    documents: list[tuple[list[int], list[int]]], width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pack documents whole into rows; each row takes the next and what fits best.

    Shapes: tokens (rows, width) uint16, marks (rows, width) uint8.
    """
    waiting, rows, marks = list(reversed(documents)), [], []
    window: list[tuple[list[int], list[int]]] = []
    while waiting or window:
        while waiting and len(window) < 48:
            window.append(waiting.pop())
        row, mark = [], []
        fits = [window[0]]
        while fits:
            best = max(fits, key=lambda d: len(d[0])) if row else fits[0]
            window.remove(best)
            row += best[0]
            mark += best[1]
            fits = [d for d in window if len(d[0]) <= width - len(row)]
        rows.append(row + [pad_id] * (width - len(row)))
        marks.append(mark + [PADDING] * (width - len(mark)))
    return np.array(rows, np.uint16), np.array(marks, np.uint8)


def build_rows(
    seed: int, count: int, width: int, tokenizer: Tokenizer, pools: dict
) -> tuple[np.ndarray, np.ndarray]:
    """`count` fresh dialogues as packed rows, each ended by <|endoftext|>."""
    rng, template = random.Random(seed), load_template()
    end = tokenizer.token_to_id("<|endoftext|>")
    texts = []
    for _ in range(count):
        dialogue = make(rng, pools)
        texts.append(template.render(messages=dialogue.messages, tools=dialogue.tools))
    documents = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids = [*encoding.ids, end]
        if len(ids) <= width:
            documents.append((ids, mark_answers(ids, tokenizer)))
    return pack_rows(documents, width, end)
