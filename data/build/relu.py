"""Trains a small dense ReLU language model and predictors of its active neurons.

Most neurons of a ReLU layer are exactly zero for a given token. How many depends on
training: an L1 penalty on the activations makes them rarer. Its weight is not set by
hand: it grows while fewer than --target of the neurons are zero and shrinks when more
are, so a run ends at the sparsity that was asked for (--target 0: no penalty).

After training the matrices are rounded to 8 bits (one scale a row), and everything
later is measured on the rounded model: nats a token on the held-out books, the share
of zeros by layer, and low-rank predictors of the neurons that are not zero. Every
layer gets two: one reads the output of the previous layer, one the stream after this
layer's attention. A predictor of rank 64 is trained so that its first 8, 16 or 32
columns alone are a predictor too.

Follows arXiv 2312.11514 (LLM in a Flash) and 2310.04564 (ReLU Strikes Back).
Data: the books and dialogue rows of train.py; every row may be used several times.

Usage: python relu.py --work DIR --rows DIR --out DIR [--target 0.97] [--seconds N]
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from relu_model import CONFIG, TINY, Model, round_rows, store
from safetensors.torch import save_file
from torch import nn

WIDTH = 512  # tokens a row
PEAK_RATE, FLOOR, WARMUP, DECAY = 2e-3, 0.05, 100, 0.1
PADDING, PROMPT_WEIGHT = 0, 0.3  # marks of the dialogue rows, as in train.py
FIRST_PENALTY = 1e-5  # nats a unit of activation, a token and layer
PENALTY_FROM = 0.05  # of the time
GAIN = 0.05  # of the penalty's logarithm, a step, for each unit that zeros lack
RANKS = (8, 16, 32, 64)
INPUTS = ("previous", "attention")
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5)


def learning_rate(step: int, done: float) -> float:
    """Linear warm-up by steps, then a cosine down to FLOOR by the share of time."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1)))
    return PEAK_RATE * min(1, (step + 1) / WARMUP) * (FLOOR + (1 - FLOOR) * cosine)


class Data:
    """Batches of book rows cut at random places and of dialogue rows."""

    def __init__(self, options: argparse.Namespace, device: str) -> None:
        self.options, self.device = options, device
        self.random = torch.Generator(device=device).manual_seed(1)
        self.books = self.load(options.work / "books.npy")
        held = self.load(options.work / "held.npy")
        n = len(held) // WIDTH
        self.held = held[: n * WIDTH].view(n, WIDTH)[: 4 if options.tiny else n]
        parts = sorted(options.rows.glob("part_*.npy"))
        self.rows = self.load(*parts)  # (rows, 2, 512): tokens, marks

    def load(self, *paths: Path) -> torch.Tensor:
        whole = np.concatenate([np.load(p) for p in paths]).astype(np.int16)
        return torch.tensor(whole, device=self.device)  # token ids are below 6144

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, 512) and the loss weights of their predictions (B, 511)."""
        n_books = self.options.book_rows
        n_rows = self.options.batch - n_books
        starts = self.draw(len(self.books) - WIDTH, n_books)
        cut = starts[:, None] + torch.arange(WIDTH, device=self.device)
        drawn = self.rows[self.draw(len(self.rows), n_rows)]
        marks = drawn[:, 1, 1:].float()  # 0 padding, 1 prompt, 2 answer
        weights = torch.where(marks == 1, PROMPT_WEIGHT, (marks > 1).float())
        tokens = torch.cat([self.books[cut], drawn[:, 0]]).long()
        return tokens, torch.cat(
            [torch.ones_like(weights[:1]).expand(n_books, -1), weights]
        )

    def draw(self, high: int, count: int) -> torch.Tensor:
        return torch.randint(
            0, high, (count,), device=self.device, generator=self.random
        )


def precision(device: str) -> torch.autocast:
    """bfloat16 products on a GPU, float32 on a CPU."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def losses(
    model: Model, data: Data, options: argparse.Namespace
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a fresh batch, and what to log or steer by, still on the device.

    `size` is the sum of a layer's activations for a token, averaged over both; `zeros`
    the share of neurons that are zero. Padding counts in neither.
    """
    tokens, weights = data.batch()
    with precision(data.device):
        logits, activations = model(tokens)
    each = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    ).view_as(weights)
    real = F.pad(weights > 0, (0, 1))[..., None]  # (B, T, 1)
    n_real = real.sum()
    sums = [(h * real).sum(dtype=torch.float32) for h in activations]
    with torch.no_grad():
        active = torch.stack([((h > 0) & real).sum() for h in activations])
        share = active.float().mean() / n_real / activations[0].shape[-1]
    log = {"books": each[: options.book_rows].mean().detach(), "zeros": 1 - share}
    log["size"] = torch.stack(sums).mean() / n_real
    return (each * weights).sum() / weights.sum(), log


def train(model: Model, data: Data, options: argparse.Namespace) -> list[dict]:
    """Train for --seconds; returns the learning curve."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=data.device == "cuda",
    )
    # On the device, so that steering it does not make the CPU wait.
    penalty = torch.full((), FIRST_PENALTY, device=data.device)
    begun, step, curve, done = time.time(), 0, [], 0.0
    while done < 1:
        loss, log = losses(model, data, options)
        on = options.target > 0 and done > PENALTY_FROM
        (loss + penalty * log["size"] if on else loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, done)
        optimizer.step()
        optimizer.zero_grad()
        if on:
            penalty *= torch.exp(GAIN * (options.target - log["zeros"]))
        step, done = step + 1, (time.time() - begun) / options.seconds
        if step % options.every == 0 or step == 10:
            now = {"step": step, "seconds": time.time() - begun}
            now |= {k: v.item() for k, v in log.items()} | {"penalty": penalty.item()}
            curve.append({k: round(v, 7) for k, v in now.items()})
            print(curve[-1], flush=True)
            if not math.isfinite(now["books"]):
                raise FloatingPointError(f"loss is not finite at step {step}")
    return curve


@torch.no_grad()
def measure(model: Model, data: Data) -> dict:
    """Nats a token on the held-out books, and how many neurons are zero."""
    model.eval()
    total, on, per_token, used = 0.0, [], [], None
    for ids in data.held.long().split(16):
        logits, activations = model(ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        total += loss.item() * len(ids)
        active = torch.stack([h.flatten(0, 1) > 0 for h in activations])  # (L, BT, F)
        on.append(active.float().mean((1, 2)) * len(ids))
        per_token.append(active.float().mean(2))
        seen = active.sum(1)
        used = seen if used is None else used + seen
    n = len(data.held)
    places = torch.tensor([0.05, 0.5, 0.95], device=data.device)
    counts = torch.cat(per_token, 1)  # (L, tokens)
    return {
        "books_nats": total / n,
        "zeros_by_layer": (1 - torch.stack(on).sum(0) / n).tolist(),
        "zeros": 1 - (torch.stack(on).sum(0) / n).mean().item(),
        "active_share_5_50_95": torch.quantile(counts, places, dim=1).T.tolist(),
        "never_active_by_layer": (used == 0).float().mean(1).tolist(),
    }


@torch.no_grad()
def watch(model: Model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictor inputs (2, L, tokens, D), each of mean square 1, and who is active.

    Input 0 is the output of the previous layer (the embedding for the first), input 1
    the stream after this layer's attention.
    """
    x, inputs, active = model.embedding(ids), [], []
    for layer in model.layers:
        after = x + layer.attention(layer.norm_attention(x))
        h = torch.relu(layer.up(layer.norm_ffn(after)))
        pair = torch.stack([x, after]).flatten(1, 2)
        inputs.append(F.rms_norm(pair, pair.shape[-1:], eps=1e-6))
        active.append(h.flatten(0, 1) > 0)
        x = after + layer.down(h)
    return torch.stack(inputs, 1), torch.stack(active)


class Predictors(nn.Module):
    """sigmoid(x A B + b): for each input and layer, A (D, 64) and B (64, F)."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        d, f = config["hidden_size"], config["intermediate_size"]
        n, rank = config["num_hidden_layers"], RANKS[-1]
        self.a = nn.Parameter(torch.randn(2, n, d, rank) / math.sqrt(d))
        self.b = nn.Parameter(torch.randn(2, n, rank, f) * 0.02)
        self.bias = nn.Parameter(torch.full((2, n, 1, f), -3.0))

    def forward(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        """(2, L, tokens, D) -> logits (2, L, tokens, F), by the first rank columns."""
        return x @ self.a[..., :rank] @ self.b[..., :rank, :] + self.bias


def train_predictors(
    model: Model, config: dict, data: Data, options: argparse.Namespace
) -> Predictors:
    """Cross-entropy of active or not, for a random rank each step."""
    predictors = Predictors(config).to(data.device)
    optimizer = torch.optim.Adam(predictors.parameters())
    begun, step, done = time.time(), 0, 0.0
    while done < 1:
        ids = data.batch()[0][: 2 * options.book_rows][:: 4 if not options.tiny else 1]
        with precision(data.device):
            inputs, active = watch(model, ids)
            logits = predictors(inputs, RANKS[step % len(RANKS)])
        target = active.expand(2, *active.shape).to(logits.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, target)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - done) + 1e-5
        optimizer.step()
        optimizer.zero_grad()
        step, done = step + 1, (time.time() - begun) / options.predictor_seconds
        if step % options.every == 0:
            print(f"predictors, step {step}: {loss.item():.4f}", flush=True)
    print(f"predictors: {step} steps", flush=True)
    return predictors


@torch.no_grad()
def store_predictors(predictors: Predictors) -> dict[str, torch.Tensor]:
    """Round A and B in place (A by column, B by row); returns what to save."""
    saved = {}
    for i, kind in enumerate(INPUTS):
        for layer in range(predictors.a.shape[1]):
            a, b = predictors.a[i, layer], predictors.b[i, layer]
            for name, matrix in (("a", a.T), ("b", b)):  # both (rank, ...)
                ints, scale = round_rows(matrix)
                matrix.copy_(ints.float() * scale[:, None])
                key = f"{kind}.{layer}.{name}"
                saved[key], saved[key + ".scale"] = ints.cpu(), scale.cpu()
            saved[f"{kind}.{layer}.bias"] = predictors.bias[i, layer, 0].cpu()
    return {name: value.contiguous() for name, value in saved.items()}


@torch.no_grad()
def judge(model: Model, predictors: Predictors, data: Data) -> list[dict]:
    """Recall, precision and over-prediction on held-out rows, by layer."""
    inputs, active = watch(model, data.held[:: max(1, len(data.held) // 16)].long())
    results = []
    for rank in RANKS:
        chances = predictors(inputs, rank).sigmoid()
        for threshold in THRESHOLDS:
            chosen = chances > threshold
            both = (chosen & active).sum((2, 3)).float()
            n_chosen, n_active = chosen.sum((2, 3)).float(), active.sum((1, 2)).float()
            for i, kind in enumerate(INPUTS):
                row = {"input": kind, "rank": rank, "threshold": threshold}
                row["recall"] = (both[i] / n_active).tolist()
                row["precision"] = (both[i] / n_chosen.clamp_min(1)).tolist()
                row["predicted_share"] = chosen[i].float().mean((1, 2)).tolist()
                results.append(row)
    return results


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", type=float, default=0.97, help="share of zeros")
    parser.add_argument("--seconds", type=float, default=140)
    parser.add_argument("--predictor-seconds", type=float, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--book-rows", type=int, default=16)
    parser.add_argument("--every", type=int, default=200, help="steps between logs")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    return parser.parse_args()


def main() -> None:
    """Train, round, measure, train the predictors, save."""
    options = read_options()
    options.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = CONFIG | (TINY if options.tiny else {})
    data, model = Data(options, device), Model(config).to(device)
    report = {"config": config, "device": "cpu", "torch": torch.__version__}
    if device == "cuda":
        report["device"] = torch.cuda.get_device_name()
    report["settings"] = {k: str(v) for k, v in vars(options).items()}
    report["parameters"] = sum(p.numel() for p in model.parameters())
    report["curve"] = train(model, data, options)
    report["trained"] = measure(model, data)
    weights = store(model)
    report["rounded"] = measure(model, data)
    print(report["trained"], report["rounded"], flush=True)
    predictors = train_predictors(model, config, data, options)
    saved = store_predictors(predictors)
    report["predictors"] = judge(model, predictors, data)
    save_file(weights, options.out / "model.safetensors")
    save_file(saved, options.out / "predictors.safetensors")
    (options.out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (options.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
