"""Trains the reduced model on books and generated dialogues.

Hugging Face's Qwen3_5MoeForCausalLM with bfloat16 weights and float32 masters, AdamW,
one cosine schedule over --steps. --seconds ends a run early with a checkpoint from
which the next run goes on, at the same place in the data and the schedule.

A batch is 64 rows of 512 tokens: book rows cut at random places, and packed dialogue
rows, each used once. Tokens of a dialogue that the assistant does not say count 0.3 in
the loss: reading them teaches the format, but the answers matter.

Usage: python train.py --work DIR --rows DIR --out DIR [--state FILE] [--seconds N]
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from heldout import WIDTH, load_pools, make_examples, summarize
from model import RouterLog, balance_loss, make_config, make_model
from render import ANSWER, PROMPT
from scoring import book_loss, exact_matches, load_held
from tokenizers import Tokenizer

PEAK_RATE = 2e-3  # AdamW
WARMUP = 100  # steps
FLOOR = 0.05  # of the peak rate, at the end
PROMPT_WEIGHT = 0.3
BALANCE_WEIGHT = 0.001
DECAY = 0.1  # of matrices


def learning_rate(step: int, n_steps: int) -> float:
    """Linear warm-up, then a cosine down to FLOOR."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(step / n_steps, 1)))
    return PEAK_RATE * min(1, (step + 1) / WARMUP) * (FLOOR + (1 - FLOOR) * cosine)


class Dialogues:
    """Rows of the part files in order; waits for a part that is not written yet."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self.part, self.row = 0, 0
        self.rows: torch.Tensor | None = None

    def next(self, count: int) -> torch.Tensor:
        """(count, 2, 512) int64: tokens and marks."""
        found = []
        while count:
            if self.rows is None:
                self.rows = self._load(self.part)
            taken = self.rows[self.row : self.row + count]
            found.append(taken)
            count -= len(taken)
            self.row += len(taken)
            if self.row == len(self.rows):
                self.part, self.row, self.rows = self.part + 1, 0, None
        return torch.cat(found)

    def _load(self, part: int) -> torch.Tensor:
        path = self.folder / f"part_{part:05d}.npy"
        while not path.exists():
            time.sleep(0.2)
        return torch.tensor(np.load(path).astype(np.int64), device=self.device)


class Optimizer:
    """AdamW over float32 masters of bfloat16 weights."""

    def __init__(self, model: torch.nn.Module, device: str) -> None:
        self.weights = list(model.parameters())
        self.masters = [p.detach().float().clone() for p in self.weights]
        for master in self.masters:
            master.requires_grad_(True)
            master.grad = torch.zeros_like(master)
        matrices = [m for m in self.masters if m.ndim >= 2]
        vectors = [m for m in self.masters if m.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            groups, lr=PEAK_RATE, betas=(0.9, 0.95), eps=1e-8, fused=device == "cuda"
        )

    def step(self, rate: float) -> torch.Tensor:
        """Apply the weights' gradients; returns their norm before clipping to 1."""
        gradients = [p.grad for p in self.weights]
        torch._foreach_copy_([m.grad for m in self.masters], gradients)
        norm = torch.nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        for p in self.weights:
            p.grad = None
        return norm


class Trainer:
    """Model, optimizer and data of a run, with their checkpoint."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        work = options.work
        self.tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
        ids = [self.tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>")]
        changes = {"num_experts": 16, "num_hidden_layers": 4} if options.tiny else {}
        self.config = make_config(*ids, **changes)
        self.model = make_model(self.config, self.device)
        self.routers = RouterLog(self.model)
        self.optimizer = Optimizer(self.model, self.device)
        books = np.load(work / "books.npy").astype(np.int32)
        self.books = torch.tensor(books, device=self.device)
        self.dialogues = Dialogues(options.rows, self.device)
        self.places = torch.Generator(device=self.device).manual_seed(1)
        self.held = load_held(work, self.device)[: 2 if options.tiny else 64]
        examples = make_examples(self.tokenizer, load_pools(work))
        self.examples = examples[:: 100 if options.tiny else 4]
        self.done, self.trained_s, self.curve = 0, 0.0, []

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, 512) and the loss weights of their predictions (B, 511)."""
        n_books = self.options.book_rows
        high = len(self.books) - WIDTH
        starts = torch.randint(
            0, high, (n_books, 1), device=self.device, generator=self.places
        )
        book_rows = self.books[starts + torch.arange(WIDTH, device=self.device)]
        drawn = self.dialogues.next(self.options.batch - n_books)
        marks = drawn[:, 1, 1:]
        weights = PROMPT_WEIGHT * (marks == PROMPT).float() + (marks == ANSWER).float()
        ones = torch.ones(n_books, WIDTH - 1, device=self.device)
        tokens = torch.cat([book_rows.long(), drawn[:, 0]])
        return tokens, torch.cat([ones, weights])

    def train_step(self) -> dict[str, torch.Tensor]:
        """One optimizer step; returns what to log, still on the device."""
        tokens, weights = self.batch()
        self.routers.on = True
        hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        self.routers.on = False
        logits = self.model.lm_head(hidden)[:, :-1].float()
        targets = tokens[:, 1:]
        losses = F.cross_entropy(
            logits.flatten(0, 1), targets.reshape(-1), reduction="none"
        ).view_as(weights)
        balance = balance_loss(self.routers.take(), self.config.num_experts_per_tok)
        loss = (losses * weights).sum() / weights.sum()
        (loss + BALANCE_WEIGHT * balance).backward()
        norm = self.optimizer.step(learning_rate(self.done, self.options.steps))
        self.done += 1
        n_books, losses = self.options.book_rows, losses.detach()
        # Products, not boolean indexing: an index would make the CPU wait for the GPU.
        answers = (weights[n_books:] == 1).float()
        return {
            "books": losses[:n_books].mean(),
            "answers": (losses[n_books:] * answers).sum() / answers.sum(),
            "balance": balance.detach(),
            "norm": norm,
        }

    def evaluate(self) -> None:
        """Add a point to the learning curve."""
        self.model.eval()
        nats, _ = book_loss(self.model, self.held)
        right = exact_matches(self.model, self.examples, self.device)
        point = {"step": self.done, "seconds": round(self.trained_s, 1)}
        point |= {"books_nats": round(nats, 4)} | summarize(self.examples, right)
        self.curve.append(point)
        self.model.train()
        shown = {k: v for k, v in point.items() if k not in ("step", "seconds")}
        print(f"== step {self.done}: {shown}", flush=True)

    def save(self, path: Path) -> None:
        """Everything that is needed to go on."""
        state = {
            "masters": [m.detach() for m in self.optimizer.masters],
            "adamw": self.optimizer.adamw.state_dict(),
            "places": self.places.get_state(),
            "part": self.dialogues.part,
            "row": self.dialogues.row,
            "done": self.done,
            "trained_s": self.trained_s,
            "curve": self.curve,
        }
        torch.save(state, path)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        with torch.no_grad():
            torch._foreach_copy_(self.optimizer.masters, state["masters"])
            torch._foreach_copy_(self.optimizer.weights, self.optimizer.masters)
        self.optimizer.adamw.load_state_dict(state["adamw"])
        self.places.set_state(state["places"].cpu())
        self.dialogues.part, self.dialogues.row = state["part"], state["row"]
        self.done, self.trained_s = state["done"], state["trained_s"]
        self.curve = state["curve"]

    def run(self) -> None:
        """Train until --steps or --seconds."""
        options, begun, before = self.options, time.time(), self.trained_s
        last_s, last_step = begun, self.done
        self.model.train()
        while self.done < options.steps and time.time() < begun + options.seconds:
            log = self.train_step()
            if self.done % 50 == 0 or self.done in (1, 10):
                values = {k: f"{v.item():.4f}" for k, v in log.items()}
                now = time.time()
                rate = (self.done - last_step) * options.batch * WIDTH / (now - last_s)
                last_s, last_step = now, self.done
                print(f"{self.done} {now - begun:.0f}s {rate:.0f} tok/s {values}")
                if not math.isfinite(float(values["books"])):
                    raise FloatingPointError(f"loss is not finite at {self.done}")
            if self.done % options.every == 0 or self.done == options.steps:
                self.trained_s = before + time.time() - begun
                self.evaluate()
        self.trained_s = before + time.time() - begun

    def write_report(self) -> None:
        """training.json: settings, versions, learning curve."""
        options = self.options
        report = {
            "steps": self.done,
            "tokens": self.done * options.batch * WIDTH,
            "book_tokens": self.done * options.book_rows * WIDTH,
            "seconds": round(self.trained_s),
            "parts_used": self.dialogues.part + 1,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "torch": torch.__version__,
            "settings": {k: str(v) for k, v in vars(options).items()},
            "curve": self.curve,
        }
        text = json.dumps(report, indent=1)
        (options.out / "training.json").write_text(text)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state", type=Path, help="checkpoint to go on from")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--steps", type=int, default=6400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--book-rows", type=int, default=7)
    parser.add_argument("--every", type=int, default=400, help="steps between tests")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    return parser.parse_args()


def main() -> None:
    """Train, keep a checkpoint, and save the finished model in bfloat16."""
    options = read_options()
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options)
    state = options.state or options.out / "state.pt"
    if state.exists():
        trainer.restore(state)
    trainer.run()
    trainer.save(state)
    trainer.write_report()
    trainer.model.to(torch.bfloat16).save_pretrained(
        options.out / "original", max_shard_size="15MB"
    )


if __name__ == "__main__":
    main()
