"""Measures a trained model at every number of experts K and every expert width.

For each combination the routed experts are quantized (and dequantized) in place, and
the held-out books and dialogues are scored. One row each goes to reduced_build.csv:
most important rows first, so that an early stop costs the least.

Usage: python measure.py --work DIR --model DIR --out DIR [--seconds N]
"""

import argparse
import csv
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from heldout import load_pools, make_examples, wilson
from model import quantize, set_k
from scoring import book_loss, exact_matches, load_held
from tokenizers import Tokenizer
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeForCausalLM

KS = (10, 8, 6, 5, 4, 3, 2, 1)
WIDTHS = (8, 6, 5, 4, 3, 2)


@dataclass(frozen=True)
class Cell:
    """How the experts are stored, and how many a token uses."""

    bits: int  # 16: bfloat16, as trained
    k: int
    rule: str = "mlx"  # mlx | minmax | none
    source_bits: int = 16  # 4: quantized to 4 bits first, then to `bits`
    dense_bits: int = 16  # 8: everything else in 8 bits too, as shipped


def list_cells() -> list[Cell]:
    """All combinations, most important first."""
    cells = [Cell(16, k, "none") for k in KS]
    cells += [Cell(4, k, dense_bits=8) for k in (10, 4)]
    for k in (10, 4):
        cells += [Cell(bits, k) for bits in WIDTHS]
        cells += [Cell(2, k, rule, 4) for rule in ("mlx", "minmax")]
        cells += [Cell(2, k, "minmax")]
    cells += [Cell(bits, k) for k in KS if k not in (10, 4) for bits in WIDTHS]
    return cells


class Weights:
    """The trained weights, and copies of them put into the model cell by cell."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = dict(model.named_parameters())
        self.trained = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.experts = [n for n in self.trained if ".experts." in n]
        self.dense = [
            n
            for n, p in self.trained.items()
            if p.ndim == 2 and n not in self.experts and p.shape[-1] % 64 == 0
        ]

    @torch.no_grad()
    def apply(self, cell: Cell) -> float:
        """Store the experts as the cell says; returns their mean relative error."""
        errors = []
        for name in self.experts:
            trained = self.trained[name]
            stored = trained
            if cell.source_bits < 16:
                stored = quantize(stored, cell.source_bits)
            if cell.bits < 16:
                stored = quantize(stored, cell.bits, cell.rule)
            self.parameters[name].copy_(stored)
            difference = (stored.float() - trained.float()).norm()
            errors.append((difference / trained.float().norm()).item())
        for name in self.dense:
            stored = self.trained[name]
            if cell.dense_bits < 16:
                stored = quantize(stored, cell.dense_bits)
            self.parameters[name].copy_(stored)
        return sum(errors) / len(errors)


class Norms:
    """Mean norm of the last layer's MoE output (routed and shared experts)."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.values: list[torch.Tensor] = []
        model.model.layers[-1].mlp.register_forward_hook(self._keep)

    def _keep(self, module, inputs, outputs) -> None:
        output = outputs[0] if isinstance(outputs, tuple) else outputs
        self.values.append(output.detach().float().norm(dim=-1).mean())

    def take(self) -> float:
        """The mean over the passes since the last call."""
        mean = torch.stack(self.values).mean().item()
        self.values = []
        return mean


class Measurement:
    """Scores one cell after another against the same held-out data."""

    def __init__(self, model, options: argparse.Namespace, device: str) -> None:
        tokenizer = Tokenizer.from_file(str(options.work / "tokenizer.json"))
        self.model, self.device = model, device
        self.weights, self.norms = Weights(model), Norms(model)
        self.held = load_held(options.work, device)[: options.rows]
        self.examples = make_examples(tokenizer, load_pools(options.work))
        self.examples = self.examples[:: options.every]
        n_bytes = int((options.work / "held_bytes.txt").read_text())
        n_tokens = load_held(options.work, "cpu").numel()
        self.bits_per_nat = n_tokens / n_bytes / math.log(2)
        self.reference: torch.Tensor | None = None  # most likely tokens, as trained

    def score(self, cell: Cell) -> dict[str, object]:
        """One row of the table."""
        error = self.weights.apply(cell)
        set_k(self.model, cell.k)
        self.norms.values = []
        nats, best = book_loss(self.model, self.held)
        norm = self.norms.take()
        if self.reference is None:
            self.reference = best
        right = exact_matches(self.model, self.examples, self.device)
        row = {"bits": cell.bits, "k": cell.k, "rule": cell.rule}
        row |= {"source_bits": cell.source_bits, "dense_bits": cell.dense_bits}
        row |= {
            "relative_error": round(error, 4),
            "books_nats_per_token": round(nats, 4),
            "books_bits_per_byte": round(nats * self.bits_per_nat, 4),
            "agreement_with_trained": round(
                (best == self.reference).float().mean().item(), 4
            ),
            "last_moe_output_norm": round(norm, 2),
        }
        return row | self.shares(right)

    def shares(self, right: list[bool]) -> dict[str, object]:
        """Exact matches by kind, with counts and 95 % intervals."""
        columns: dict[str, object] = {}
        for kind in ("tool", "json", "tools", "reply"):
            for name, unseen in (("", None), ("_seen", False), ("_unseen", True)):
                oks = [
                    ok
                    for e, ok in zip(self.examples, right, strict=True)
                    if e.kind == kind and unseen in (None, e.unseen)
                ]
                low, high = wilson(sum(oks), len(oks))
                columns[f"{kind}{name}_exact"] = round(sum(oks) / len(oks), 4)
                if not name:
                    columns[f"{kind}_n"] = len(oks)
                    columns[f"{kind}_low"] = round(low, 4)
                    columns[f"{kind}_high"] = round(high, 4)
        return columns


def shown(row: dict[str, object]) -> str:
    """The columns worth watching."""
    names = "bits k rule source_bits dense_bits books_nats_per_token tool_exact".split()
    names += "tool_unseen_exact json_exact json_unseen_exact tools_exact".split()
    return " ".join(f"{name}={row[name]}" for name in names)


def main() -> None:
    """Measure all cells, or as many as the time allows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--rows", type=int, default=10**6, help="rows of books")
    parser.add_argument("--every", type=int, default=1, help="every n-th dialogue")
    parser.add_argument("--cells", type=int, default=10**6)
    options = parser.parse_args()
    begun = time.time()
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = Qwen3_5MoeForCausalLM.from_pretrained(options.model, dtype=dtype)
    model = model.to("cuda" if on_gpu else "cpu").eval()
    model.set_experts_implementation("grouped_mm" if on_gpu else "eager")
    measurement = Measurement(model, options, "cuda" if on_gpu else "cpu")
    with (options.out / "reduced_build.csv").open("w", newline="") as file:
        writer = None
        for cell in list_cells()[: options.cells]:
            if time.time() > begun + options.seconds:
                break
            row = measurement.score(cell)
            if writer is None:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            print(f"{time.time() - begun:.0f}s {shown(row)}", flush=True)


if __name__ == "__main__":
    main()
