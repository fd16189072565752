"""Responses that are kept, in memory, so that conversations can go on from them and clients can ask again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from fastserve.errors import RequestError
from fastserve.serve.generation import Generation


@dataclass(slots=True, eq=False, kw_only=True)
class KeptResponse:
    """A response, and the conversation that it answers."""

    owner: str
    messages: Seq[Mapping[str, Any]]  # without instructions; once it is complete, with the answer
    document: Mapping[str, Any]
    generation: Generation | None = None  # while it is being generated

    def cancel(self) -> None:
        """Have what is being generated end where it is."""
        if self.generation is not None:
            self.generation.close()
            self.generation.nudge()


class ResponseStore:
    """The newest responses, by id, each for its owner alone."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._responses: OrderedDict[str, KeptResponse] = OrderedDict()

    def __len__(self) -> int:
        return len(self._responses)

    def keep(self, response: KeptResponse) -> None:
        """The oldest goes where there are too many; what it still generates goes on unseen."""
        self._responses[response.document["id"]] = response
        while len(self._responses) > self._most:
            self._responses.popitem(last=False)

    def find(self, response_id: str, owner: str, *, param: str = "response_id") -> KeptResponse:
        """
        Raises:
            RequestError: there is none of that id, or it is somebody else's.
        """
        response = self._responses.get(response_id)
        if response is None or response.owner != owner:
            raise RequestError(
                f"there is no response {response_id[:100]!r}",
                status=404,
                code="response_not_found",
                param=param,
                hint=f"the last {self._most} are kept, until the server ends",
            )
        return response

    def delete(self, response_id: str, owner: str) -> None:
        """Raises as `find`."""
        self.find(response_id, owner).cancel()
        del self._responses[response_id]
