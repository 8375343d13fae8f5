"""A small transformer encoder that classifies sequences of tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 1000
LENGTH = 64


class SelfAttention(nn.Module):
    """Multi-head self-attention with separate projections for query, key and value."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within `[batch, length, dim]`."""
        query, key, value = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        attended = functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        return x.reshape(batch, length, self.heads, dim // self.heads).transpose(1, 2)


class EncoderLayer(nn.Module):
    """Attention and a feed-forward net, each followed by layer normalisation of the sum."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `[batch, length, dim]`."""
        x = self.norm1(x + self.self_attn(x))
        out: Tensor = self.norm2(x + self.linear2(functional.gelu(self.linear1(x))))
        return out


class EncoderClassifier(nn.Module):
    """Transformer encoder with learned positions and a classifier on the mean token.

    Vaswani et al., "Attention Is All You Need", 2017; learned positions and GELU as in
    Devlin et al., "BERT", 2019. Input int64 token ids `[batch, 64]` below 1000, output
    `[batch, 10]`.
    """

    def __init__(self, dim: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.positions = nn.Parameter(torch.zeros(1, LENGTH, dim))
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.Sequential(*(EncoderLayer(dim, heads) for _ in range(depth)))
        self.classifier = nn.Linear(dim, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Classify token ids."""
        x = self.norm(self.embedding(tokens) + self.positions)
        logits: Tensor = self.classifier(self.layers(x).mean(1))
        return logits
        return x
