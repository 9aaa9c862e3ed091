"""A small dense decoder-only language model with ReLU feed-forward layers, in torch.

RMSNorm, causal attention with rotary positions, and feed-forward layers that are wide
against the stream, so that single neurons are worth skipping. The model also returns
its activations: relu.py penalises and counts them. Saved with 8 bits a value.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 3072,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 6144,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
}
TINY = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2}
DROPOUT = 0.1  # of what a block adds to the stream; the books are read several times


class Attention(nn.Module):
    """Causal attention with rotary positions (pairs: first half, second half)."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        d, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.theta = config["rope_theta"]
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.rotate(q), self.rotate(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, D))

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Turn each pair (x[i], x[i + Dh/2]) by position · theta^(-2i/Dh)."""
        half = x.shape[-1] // 2
        powers = torch.arange(half, device=x.device) / half
        places = torch.arange(x.shape[-2], device=x.device)
        angles = places[:, None] * self.theta**-powers  # (T, Dh/2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Layer(nn.Module):
    """x + attention(norm(x)), then + down · relu(up · norm(x))."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        d, f = config["hidden_size"], config["intermediate_size"]
        self.norm_attention = nn.RMSNorm(d, eps=config["rms_norm_eps"])
        self.attention = Attention(config)
        self.norm_ffn = nn.RMSNorm(d, eps=config["rms_norm_eps"])
        self.up = nn.Linear(d, f, bias=False)
        self.down = nn.Linear(f, d, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, D) -> the stream after the layer, and the activations (B, T, F)."""
        y = self.attention(self.norm_attention(x))
        x = x + F.dropout(y, DROPOUT, self.training)
        h = torch.relu(self.up(self.norm_ffn(x)))
        return x + F.dropout(self.down(h), DROPOUT, self.training), h


class Model(nn.Module):
    """The language model; the embedding is also the head."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        n_layers, d = config["num_hidden_layers"], config["hidden_size"]
        self.embedding = nn.Embedding(config["vocab_size"], d)
        self.layers = nn.ModuleList(Layer(config) for _ in range(n_layers))
        self.norm = nn.RMSNorm(d, eps=config["rms_norm_eps"])
        for name, p in self.named_parameters():
            if p.ndim == 2:
                adds = name.endswith(("out.weight", "down.weight"))
                fan_in = 2500 if "embedding" in name else p.shape[1]
                scale = 1 / math.sqrt(2 * n_layers) if adds else 1
                nn.init.normal_(p, std=scale / math.sqrt(fan_in))

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(B, T) -> logits (B, T, V) and every layer's activations."""
        x, activations = self.embedding(ids), []
        for layer in self.layers:
            x, h = layer(x)
            activations.append(h)
        return F.linear(self.norm(x), self.embedding.weight), activations


def round_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8 bits a value, one scale a row: (R, C) -> int8 (R, C), float32 (R,)."""
    scale = matrix.abs().amax(1).clamp_min(1e-12) / 127
    return (matrix / scale[:, None]).round().to(torch.int8), scale


@torch.no_grad()
def store(model: Model) -> dict[str, torch.Tensor]:
    """Round the model's matrices in place; returns what to save.

    `down` is stored neuron-major (F, D), as `up` is: row i of both is neuron i.
    """
    saved = {}
    for name, p in model.named_parameters():
        if p.ndim != 2:
            saved[name] = p.float().cpu()
            continue
        turn = name.endswith("down.weight")
        ints, scale = round_rows(p.T if turn else p)
        whole = ints.float() * scale[:, None]
        p.copy_(whole.T if turn else whole)
        saved[name], saved[name + ".scale"] = ints.cpu().contiguous(), scale.cpu()
    return saved
