"""Held-out scores in torch: books in nats a token, dialogues by exact greedy match.

Greedy decoding gives exactly the wanted answer if and only if, with the wanted answer
as input, every one of its tokens has the highest logit. So one forward pass measures
what generation would, for hundreds of dialogues at once.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from heldout import WIDTH, Example


@torch.no_grad()
def exact_matches(
    model, examples: list[Example], device: str, batch: int = 200
) -> list[bool]:
    """For each example: would greedy decoding give exactly the wanted answer?"""
    right = []
    for first in range(0, len(examples), batch):
        group = examples[first : first + batch]
        width = -(-max(len(e.ids) for e in group) // 64) * 64
        ids = torch.zeros(len(group), width, dtype=torch.long)
        answer = torch.zeros(len(group), width, dtype=torch.bool)
        for row, e in enumerate(group):
            ids[row, : len(e.ids)] = torch.tensor(e.ids)
            answer[row, e.start : len(e.ids)] = True
        ids, answer = ids.to(device), answer[:, 1:].to(device)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        # Logits only where an answer token is predicted: (tokens, V)
        predicted = model.lm_head(hidden[:, :-1][answer]).argmax(-1)
        wrong = torch.zeros_like(answer)
        wrong[answer] = predicted != ids[:, 1:][answer]
        right += (~wrong.any(1)).tolist()
    return right


@torch.no_grad()
def book_loss(
    model, books: torch.Tensor, batch: int = 64
) -> tuple[float, torch.Tensor]:
    """Nats a token over rows of 512 tokens, and the most likely tokens.

    Shapes: books (rows, 512) -> argmax (rows, 511) int16.
    """
    total, best = 0.0, []
    for first in range(0, len(books), batch):
        ids = books[first : first + batch].long()
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)[:, :-1].float()
        targets = ids[:, 1:].reshape(-1)
        loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
        total += loss.double().item()
        best.append(logits.argmax(-1).to(torch.int16))
    return total / (books.shape[0] * (books.shape[1] - 1)), torch.cat(best)


def load_held(work: Path, device: str) -> torch.Tensor:
    """The held-out books as rows of 512 tokens, (rows, 512) int32 on the device."""
    ids = np.load(work / "held.npy")
    rows = ids[: len(ids) // WIDTH * WIDTH].reshape(-1, WIDTH)
    return torch.tensor(rows.astype(np.int32), device=device)
