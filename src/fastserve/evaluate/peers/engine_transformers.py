"""transformers on PyTorch: float32 where that is asked for, else bfloat16: it has no fewer bits on CPUs."""

from __future__ import annotations

from typing import Any


class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        import torch
        import transformers

        self.version = transformers.__version__
        torch.set_num_threads(job["threads"])
        self._torch = torch
        self.weights = "f32" if job["weights"] == "f32" else "bf16"
        dtype = torch.float32 if job["weights"] == "f32" else torch.bfloat16
        loader = transformers.AutoModelForCausalLM if job["task"] == "generate" else transformers.AutoModel
        self._model: Any = loader.from_pretrained(job["model"], dtype=dtype, local_files_only=True)
        self._model.train(False)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        ids = self._torch.tensor(prompts)
        with self._torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        tokens: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return tokens

    def embed(self, texts: list[list[int]]) -> Any:
        """Means over the tokens of each text; texts are padded to the longest."""
        length = max(map(len, texts))
        ids = self._torch.tensor([text + [0] * (length - len(text)) for text in texts])
        lengths = self._torch.tensor([len(text) for text in texts])
        mask = self._torch.arange(length) < lengths[:, None]
        with self._torch.inference_mode():
            hidden = self._model(ids, attention_mask=mask.long()).last_hidden_state.float()
        return (hidden * mask[:, :, None]).sum(1) / lengths[:, None]
