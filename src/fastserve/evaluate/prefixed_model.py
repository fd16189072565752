"""A decoder of `transformers` behind its tuned prefix, as it is in a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.models.prefix import Prefix, prefix_tensor, read_prefix


class PrefixedModel(torch.nn.Module):
    """A model that reads every batch after the same keys and values.

    Args:
        model: a decoder of `transformers`, with a head of its own or not.
        layers: of each layer its keys and its values, each [1, num_kv_heads, tokens, head_dim].
    """

    def __init__(self, model: Any, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.model = model
        self._layers = layers

    def forward(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: Any) -> Any:
        return self.model(
            input_ids=input_ids,
            attention_mask=self._mask(attention_mask),
            past_key_values=self._cache(len(input_ids)),
            **inputs,
        )

    def generate(
        self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int, **_: Any
    ) -> torch.Tensor:
        """The likeliest tokens after one prompt [1, tokens], with it in front, until the model ends."""
        assert attention_mask.all()
        cache, ending = self._cache(1), self.model.generation_config.eos_token_id
        endings = ending if isinstance(ending, list) else [ending]
        ids, fresh = input_ids, input_ids
        for _step in range(max_new_tokens):
            fresh = self.model(input_ids=fresh, past_key_values=cache).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, fresh], dim=1)
            if int(fresh) in endings:
                break
        return ids

    def _mask(self, mask: torch.Tensor) -> torch.Tensor:
        num_tokens = self._layers[0][0].shape[2]
        return torch.cat([mask.new_ones(len(mask), num_tokens), mask], dim=1)

    def _cache(self, batch_size: int) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for index, (keys, values) in enumerate(self._layers):
            cache.update(*(part.expand(batch_size, -1, -1, -1) for part in (keys, values)), index)
        return cache


def put_behind_prefix(model: Any, folder: Path) -> Any:
    """The model of a folder, behind its prefix where it has one."""
    checkpoint = open_checkpoint(folder)
    prefix = read_prefix(checkpoint.config)
    if prefix is None:
        return model
    config = model.config
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads

    def part(index: int, name: str, of: Prefix) -> torch.Tensor:
        stored = torch.from_numpy(to_f32(checkpoint.tensors[prefix_tensor(index, name)]))
        return stored.view(of.num_tokens, num_heads, -1).transpose(0, 1)[None]

    layers = range(config.num_hidden_layers)
    return PrefixedModel(
        model, [(part(index, "keys", prefix), part(index, "values", prefix)) for index in layers]
    )
