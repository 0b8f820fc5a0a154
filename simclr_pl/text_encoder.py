"""A small transformer that turns tokens into features.

Symbols: n rows, L places in a row, E feature width.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_pl.errors import InputError


class TextEncoder(nn.Module):
    """A transformer with learnt positions and layer norm first: token numbers in, features out.

    Vaswani et al. 2017, arXiv:1706.03762; layer norm first as in Xiong et al. 2020, arXiv:2002.04745.
    Padding is never attended to, so it changes no feature.

    Args:
        vocab_size: tokens of the tokenizer, as the source's.
        width: E, features and the inner width.
        depth: layers.
        heads: of attention, in each layer.
        max_length: tokens of a view at most.
        dropout: probability, of the embeddings and of what each part adds; with views of the same tokens
            it makes them differ.
        pooling: of the tokens to one feature: "mean" or "max".

    Attributes:
        num_features: the feature width E.

    Raises:
        InputError: a number out of its range, or ``width`` does not divide by ``heads``; in `forward`,
            views that are no token numbers or longer than ``max_length``.
    """

    def __init__(
        self,
        vocab_size: int = 8192,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        max_length: int = 128,
        dropout: float = 0.1,
        pooling: Literal["mean", "max"] = "mean",
    ) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "width": width, "depth": depth, "heads": heads}
        for name, value in {**sizes, "max_length": max_length}.items():
            if value < 1:
                raise InputError(f"`{name}` must be >= 1; got {value}. Set `model.encoder.{name}`.")
        if width % heads:
            raise InputError(
                f"`width` must divide by `heads`; got {width} and {heads}. Set `model.encoder.width`."
            )
        if not 0 <= dropout < 1:
            raise InputError(
                f"`dropout` must be within [0, 1); got {dropout}. Set `model.encoder.dropout`."
            )
        self.vocab_size, self.max_length, self.pooling = vocab_size, max_length, pooling
        self.num_features = width
        self.tokens = nn.Embedding(vocab_size + 1, width, padding_idx=0)
        self.positions = nn.Parameter(torch.zeros(max_length, width))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(_Layer(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        # As in BERT and GPT-2
        nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.tokens.weight, std=0.02)
        with torch.no_grad():
            self.tokens.weight[0].zero_()

    def check_source(self, source: Any) -> None:
        """Checks that a source has no token that the encoder does not know.

        Raises:
            InputError: it may have.
        """
        theirs = getattr(source, "vocab_size", self.vocab_size)
        if theirs > self.vocab_size:
            raise InputError(
                f"the encoder's `vocab_size` must be that of the source, or more; got "
                f"{self.vocab_size:,} for {theirs:,}. Set `model.encoder.vocab_size`."
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps token numbers (n, L) int64, 0 for padding, to features (n, E)."""
        if x.dim() != 2 or x.is_floating_point() or x.shape[1] > self.max_length:
            raise InputError(
                f"the encoder takes (n, L) token numbers with L <= `max_length` {self.max_length}; got "
                f"{tuple(x.shape)} {x.dtype}. Set `model.encoder.max_length` to that of `data.augment`."
            )
        real = x != 0  # (n, L)
        h = self.dropout(self.tokens(x) + self.positions[: x.shape[1]])  # (n, L, E)
        # A row of nothing but padding attends to its first place, for a mean over nothing is no number
        seen = torch.cat([real[:, :1] | ~real.any(1, keepdim=True), real[:, 1:]], 1)
        for layer in self.layers:
            h = layer(h, seen[:, None, None])
        h = self.norm(h)
        if self.pooling == "max":
            return h.masked_fill(~seen[..., None], -torch.inf).amax(1)  # type: ignore[no-any-return]
        weight = seen[..., None].to(h.dtype)
        return (h * weight).sum(1) / weight.sum(1)  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.think = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, seen: Tensor) -> Tensor:
        """(n, L, E) to the same; ``seen`` (n, 1, 1, L) bool, what may be attended to."""
        n, length, width = h.shape
        parts = self.mix(self.norm_1(h)).view(n, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # (n, heads, L, width / heads) each
        rate = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=rate)
        h = h + self.dropout(self.merge(mixed.transpose(1, 2).reshape(n, length, width)))
        return h + self.dropout(self.think(self.norm_2(h)))  # type: ignore[no-any-return]
