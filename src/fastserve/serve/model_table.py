"""The models that are served, by name."""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq

from fastserve.engine.async_embedder import AsyncEmbedder
from fastserve.engine.async_llm import AsyncLLM
from fastserve.engine.load import check_task
from fastserve.errors import ModelNotFoundError, OptionError

ServedModel = AsyncLLM | AsyncEmbedder


class ModelTable:
    """Finds a model by the name that a request has.

    Raises:
        OptionError: there are none, or two of one name.
    """

    def __init__(self, models: Seq[ServedModel]) -> None:
        self._models = {model.name: model for model in models}
        self.created = int(time.time())
        if not models:
            raise OptionError("there is no model to serve", hint="name at least one")
        if len(self._models) < len(models):
            names = ", ".join(model.name for model in models)
            raise OptionError(f"two models have one name: {names}", hint="serve each of them once")

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    @property
    def generators(self) -> list[AsyncLLM]:
        return [model for model in self if isinstance(model, AsyncLLM)]

    def find(self, name: str) -> ServedModel:
        """
        Raises:
            ModelNotFoundError: there is none of that name; it names those that there are.
        """
        if name not in self._models:
            raise ModelNotFoundError(
                f"there is no model {name[:100]!r}", hint=f"this server has {', '.join(self._models)}"
            )
        return self._models[name]

    def find_generator(self, name: str) -> AsyncLLM:
        """
        Raises:
            ModelNotFoundError, UnsupportedError: there is none of that name, or it is an encoder.
        """
        model = self.find(name)
        check_task("generate", model.model.config, name)
        assert isinstance(model, AsyncLLM)
        return model

    def find_embedder(self, name: str) -> AsyncEmbedder:
        """
        Raises:
            ModelNotFoundError, UnsupportedError: there is none of that name, or it generates text.
        """
        model = self.find(name)
        check_task("embed", model.model.config, name)
        assert isinstance(model, AsyncEmbedder)
        return model

    async def close(self) -> None:
        """Stop them all. Whatever is still streaming ends with an error."""
        for model in self:
            await model.close()
