"""A `transformers` encoder with a pooling on top: pairs of texts in, pairs of embeddings out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastserve.models.pooling import Pooling


class EmbeddingModel(nn.Module):
    """Both texts of a pair go through the same encoder; `embedding` is [pairs, 2, width], not scaled."""

    def __init__(self, encoder: Any, pooling: Pooling) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, pair_input_ids: Tensor, pair_attention_mask: Tensor
    ) -> dict[str, Tensor]:
        first = self._embed(input_ids, attention_mask)
        second = self._embed(pair_input_ids, pair_attention_mask)
        return {"embedding": torch.stack([first, second], dim=1)}

    def _embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        match self.pooling.kind:
            case "first":
                pooled: Tensor = hidden[:, 0]
            case "last":
                last = attention_mask.sum(dim=1) - 1
                pooled = hidden[torch.arange(len(last)), last]
            case _:
                weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
                pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return pooled
