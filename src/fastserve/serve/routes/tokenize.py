"""/tokenize, /detokenize, /apply-template: what the model sees of a text."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fastserve.engine.prompt import encode_prompt, render_prompt
from fastserve.option import check_integer
from fastserve.serve.schema.body import ERRORS
from fastserve.serve.schema.tokenize import (
    DetokenizeDocument,
    DetokenizeRequest,
    TemplateDocument,
    TemplateRequest,
    TokenizeDocument,
    TokenizeRequest,
)
from fastserve.serve.service import Service
from fastserve.serve.stream import json_response


def tokenize_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["tokenize"], responses=ERRORS)

    @router.post("/tokenize", response_model=TokenizeDocument)
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        async with service.model(body.model, request) as served:
            model = served.model
            token_ids = await asyncio.to_thread(
                encode_prompt, model, body.prompt, add_special_tokens=body.add_special_tokens is not False
            )
            document = {"tokens": token_ids, "count": len(token_ids), "max_model_len": model.context_length}
            if body.return_token_strs:
                document["token_strs"] = [model.tokenizer.token_text(id_) or "" for id_ in token_ids]
        return json_response(document)

    @router.post("/detokenize", response_model=DetokenizeDocument)
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        async with service.model(body.model, request) as served:
            tokenizer = served.model.tokenizer
            for token_id in body.tokens:
                check_integer("tokens", token_id, low=0, high=tokenizer.vocab_size - 1)
            text = await asyncio.to_thread(
                tokenizer.decode, body.tokens, skip_special_tokens=bool(body.skip_special_tokens)
            )
        return json_response({"prompt": text})

    @router.post("/apply-template", response_model=TemplateDocument)
    async def apply_template(body: TemplateRequest, request: Request) -> Response:
        async with service.model(body.model, request) as served:
            prompt = await asyncio.to_thread(
                render_prompt,
                served.model,
                [message.to_template() for message in body.messages],
                variables=body.chat_template_kwargs,
                add_generation_prompt=body.add_generation_prompt is not False,
            )
        return json_response({"prompt": prompt})

    return router
