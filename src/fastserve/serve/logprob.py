"""Log-probabilities as OpenAI's APIs write them."""

from __future__ import annotations

from typing import Any

from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.engine.completion import TokenLogprobs


class LogprobWriter:
    """Of the tokens of one tokenizer. A token's text is what it adds within a text, replaced where it is no
    whole character; its bytes are exact."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def chat(self, logprobs: TokenLogprobs) -> dict[str, Any]:
        """A token of chat completions."""
        top = [self._token(token_id, logprob) for token_id, logprob in logprobs.top]
        return {**self._token(logprobs.token_id, logprobs.logprob), "top_logprobs": top}

    def text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}
