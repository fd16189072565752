"""Our tokenizer under the few names by which tasks ask one of `transformers`."""

from __future__ import annotations

from typing import Any

from fastserve.checkpoint.tokenizer import Tokenizer


class LabelTokenizer:
    """What `fastserve.evaluate.task.generation` needs of a tokenizer to find the tokens that are learned."""

    def __init__(self, tokenizer: Tokenizer, chat_template: str | None) -> None:
        self._tokenizer = tokenizer
        self.chat_template = chat_template
        self.special_tokens_map = tokenizer.special_tokens
        self.eos_token = tokenizer.special_tokens.get("eos_token", "")
        self.eos_token_id = tokenizer.eos_token_id

    def __call__(
        self,
        text: str,
        *,
        add_special_tokens: bool,
        return_offsets_mapping: bool = False,
        verbose: bool = True,
    ) -> dict[str, Any]:
        """Token ids of a text, and of each where it is from; special tokens are those in the text alone."""
        assert not add_special_tokens
        del verbose  # of the warning that a text is longer than the model takes
        if not return_offsets_mapping:
            return {"input_ids": self._tokenizer.encode(text, add_special_tokens=False)}
        encoding = self._tokenizer.encode_with_origin(text)
        kept = [index for index, part in enumerate(encoding.parts) if part is not None]
        return {
            "input_ids": [encoding.ids[index] for index in kept],
            "offset_mapping": [encoding.offsets[index] for index in kept],
        }
