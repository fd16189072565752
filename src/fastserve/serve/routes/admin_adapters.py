"""/admin/adapters: which adapters are beside the models; having them loaded, swapped and unloaded."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fastserve.errors import CheckpointError, ModelNotFoundError, OptionError, UnsupportedError
from fastserve.serve.model_entry import ModelEntry
from fastserve.serve.record import RequestRecord
from fastserve.serve.schema.admin_adapters import AdapterFolder, AdapterName
from fastserve.serve.schema.body import ERRORS
from fastserve.serve.service import Service
from fastserve.serve.stream import json_response


@dataclass(frozen=True, slots=True)
class AdapterDescription:
    """An adapter that a server has. `id` is the name that requests choose it by."""

    id: str
    model: str
    name: str
    path: str


@dataclass(frozen=True, slots=True)
class AdapterList:
    """Adapters that a server has."""

    adapters: Seq[AdapterDescription]


def admin_adapters_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/admin/adapters", tags=["admin"], responses=ERRORS)
    models = service.models

    @router.get("", response_model=AdapterList)
    async def list_adapters() -> Response:
        found = [_describe(entry, name) for entry in models.entries for name in entry.adapters]
        return json_response(asdict(AdapterList(found)))

    @router.post("/load", response_model=AdapterDescription)
    async def load(body: AdapterFolder, request: Request) -> Response:
        """Have an adapter loaded beside a model, which is loaded where it is not, in place of one that has
        its name: requests that have that one go on with it."""
        async with service.model(body.model, request) as model:
            entry = models.memory.entry_of(model)
            if f"{entry.name}:{body.name}" in (*models.further_names(), *(e.name for e in models.entries)):
                raise OptionError(
                    f"{entry.name}:{body.name} is the name of a model",
                    hint="choose another name",
                    option="name",
                )
            path = Path(body.path).expanduser().absolute()
            try:
                await model.load_adapter(body.name, path)
            except (CheckpointError, UnsupportedError) as error:  # what the request names is to blame
                raise OptionError(error.message, hint=error.hint, option="path") from error
            entry.adapters[body.name] = path
        return _answer(entry, body.name, request)

    @router.post("/unload", response_model=AdapterDescription)
    async def unload(body: AdapterName, request: Request) -> Response:
        """Have an adapter forgotten. Requests that have it go on with it."""
        entry = models.find(body.model)
        if body.name not in entry.adapters:
            raise ModelNotFoundError(
                f"the model {entry.name!r} has no adapter {body.name[:100]!r}",
                hint=f"it has {', '.join(entry.adapters)}" if entry.adapters else "it has none",
            )
        answer = _answer(entry, body.name, request)
        del entry.adapters[body.name]
        if entry.model is not None and body.name in entry.model.adapters.names:
            await entry.model.unload_adapter(body.name)
        return answer

    def _answer(entry: ModelEntry, name: str, request: Request) -> Response:
        RequestRecord.of(request.scope).details |= {"model": entry.name, "adapter": name}
        return json_response(asdict(_describe(entry, name)))

    return router


def _describe(entry: ModelEntry, name: str) -> AdapterDescription:
    return AdapterDescription(f"{entry.name}:{name}", entry.name, name, str(entry.adapters[name]))
