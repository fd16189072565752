"""Responses that are kept, in memory, so that conversations can go on from them and clients can ask again."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from fastserve.errors import RequestError


@dataclass(slots=True, eq=False, kw_only=True)
class KeptResponse:
    """A response, and the conversation that it answers, as JSON: what is kept is what is counted."""

    response_id: str
    owner: str
    status: str = "in_progress"
    document: bytes = b""
    messages: bytes = b""  # without instructions, with the answer; empty before it is complete
    cancel: Callable[[], None] | None = None  # while it is being generated: has it end where it is

    @property
    def num_bytes(self) -> int:
        return len(self.document) + len(self.messages)


class ResponseStore:
    """The newest responses, by id, each for its owner alone. Where there are too many, or too many bytes, the
    oldest goes of the owner who has most: nobody loses theirs to others who keep more.

    Args:
        most: responses.
        most_bytes: of their documents and conversations.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._owned: defaultdict[str, dict[str, KeptResponse]] = defaultdict(dict)  # by owner, oldest first
        self._owners: dict[str, str] = {}  # by response_id
        self._counted: dict[str, int] = {}  # bytes by response_id, when it was kept last
        self._num_bytes: Counter[str] = Counter()  # by owner

    def __len__(self) -> int:
        return len(self._owners)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes.total()

    def keep(self, response: KeptResponse) -> None:
        """Keep a response that is new. What one that has to go still generates goes on unseen."""
        self._owned[response.owner][response.response_id] = response
        self._owners[response.response_id] = response.owner
        self._count(response)

    def update(self, response: KeptResponse) -> None:
        """It has changed; nothing happens where it is not kept any more."""
        if response.response_id in self._owners:
            self._count(response)

    def find(self, response_id: str, owner: str, *, param: str = "response_id") -> KeptResponse:
        """
        Raises:
            RequestError: there is none of that id, or it is somebody else's.
        """
        response = self._owned[owner].get(response_id) if owner in self._owned else None
        if response is None:
            raise RequestError(
                f"there is no response {response_id[:100]!r}",
                status=404,
                code="response_not_found",
                param=param,
                hint=f"{self._most} are kept, of {self._most_bytes} bytes together, until the server ends",
            )
        return response

    def delete(self, response_id: str, owner: str) -> None:
        """Raises as `find`."""
        response = self.find(response_id, owner)
        if response.cancel is not None:
            response.cancel()  # its last document may cost it its place
        if response_id in self._owners:
            self._forget(response)

    def _count(self, response: KeptResponse) -> None:
        self._num_bytes[response.owner] += response.num_bytes - self._counted.get(response.response_id, 0)
        self._counted[response.response_id] = response.num_bytes
        while len(self) > self._most:
            self._forget_oldest_of(max(self._owned, key=lambda owner: len(self._owned[owner])))
        while self.num_bytes > self._most_bytes:
            self._forget_oldest_of(max(self._owned, key=lambda owner: self._num_bytes[owner]))

    def _forget_oldest_of(self, owner: str) -> None:
        self._forget(next(iter(self._owned[owner].values())))

    def _forget(self, response: KeptResponse) -> None:
        owned = self._owned[response.owner]
        del owned[response.response_id], self._owners[response.response_id]
        self._num_bytes[response.owner] -= self._counted.pop(response.response_id)
        if not owned:
            del self._owned[response.owner], self._num_bytes[response.owner]
