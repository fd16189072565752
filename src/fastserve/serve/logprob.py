"""Log-probabilities as OpenAI's APIs write them."""

from __future__ import annotations

from typing import Any

from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.engine.completion import TokenLogprobs


class LogprobWriter:
    """Of the tokens of one tokenizer, by what they add within a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def chat(self, logprobs: TokenLogprobs) -> dict[str, Any]:
        """A token of chat completions, with its bytes; its text is replaced where it is no whole
        character."""
        top = [self._token(token_id, logprob) for token_id, logprob in logprobs.top]
        return {**self._token(logprobs.token_id, logprobs.logprob), "top_logprobs": top}

    def text(self, token_id: int) -> str:
        """A token of completions, which have no bytes: what is no whole character is written in hexadecimal,
        so that two tokens are never one."""
        data = self._tokenizer.token_bytes(token_id) or b""
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def top(self, logprobs: TokenLogprobs, num_top: int) -> dict[str, float]:
        """The likeliest tokens of completions, and the chosen one."""
        found = (*logprobs.top[:num_top], (logprobs.token_id, logprobs.logprob))
        return {self.text(token_id): logprob for token_id, logprob in found}

    def prompt(self, logprobs: TokenLogprobs, num_top: int) -> dict[str, Any]:
        """A token of a prompt, and the likeliest in its place, by id."""
        found = (*logprobs.top[:num_top], (logprobs.token_id, logprobs.logprob))
        return {
            str(token_id): {"logprob": logprob, "decoded_token": self.text(token_id)}
            for token_id, logprob in found
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id) or b""
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}
