"""`POST /cached_attention/hint`: a client says that a conversation will continue soon, is to be kept, or is over.

The prompt is tokenized as SGLang would tokenize it in a request, so that its pages are those of the next turn.
"""

from __future__ import annotations

import sys
from array import array
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from sglang.srt.managers.io_struct import BaseReq, GenerateReqInput, hook_custom_types
from sglang.srt.utils.auth import AuthLevel, auth_level
from sglang.utils import TypeBasedDispatcher

if TYPE_CHECKING:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

PATH = "/cached_attention/hint"
Token = Annotated[int, Field(ge=0, lt=2**31)]


class Outlook(StrEnum):
    """What a hint says about a conversation."""

    EXPECTED = "expected"
    KEPT = "kept"
    DROPPED = "dropped"


class HintReqInput(BaseReq, kw_only=True):  # type: ignore[call-arg]
    """A hint on its way to every scheduler."""

    outlook: str
    expect_in_s: float = 0.0
    conversation: str | None = None
    # Without its parameter, which Python 3.11 does not know and msgspec evaluates.
    input_ids: array | None = None  # type: ignore[type-arg]
    extra_key: str | None = None
    cache_salt: str | None = None


class HintBody(BaseModel):
    """What a client posts; it may also contain fields of a chat completion, such as `tools`."""

    model_config = ConfigDict(extra="allow")

    prompt: str | list[Token] | None = Field(None, min_length=1)
    messages: list[dict[str, Any]] | None = Field(None, min_length=1)
    conversation: str | None = Field(None, min_length=1)
    """`id` of the conversation's last response."""
    expect_in_s: float | None = Field(None, ge=0, le=86_400)
    """Seconds until the next turn is expected."""
    keep: bool = False
    drop: bool = False
    extra_key: str | None = None
    cache_salt: str | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if sum(given is not None for given in (self.prompt, self.messages, self.conversation)) != 1:
            raise ValueError("give one of 'prompt', 'messages' and 'conversation'")
        if sum((self.expect_in_s is not None, self.keep, self.drop)) != 1:
            raise ValueError("give one of 'expect_in_s' (seconds), 'keep' (true) and 'drop' (true)")
        return self

    @property
    def outlook(self) -> Outlook:
        return Outlook.KEPT if self.keep else Outlook.DROPPED if self.drop else Outlook.EXPECTED


def accept_hints(dispatcher: TypeBasedDispatcher, handle: Any) -> TypeBasedDispatcher:
    """In a scheduler: dispatch hints to `handle`."""
    dispatcher += TypeBasedDispatcher([(HintReqInput, handle)])
    return dispatcher


def let_hints_pass() -> None:
    """Register the message type; needed in every process that reads SGLang's messages."""
    hook_custom_types(HintReqInput)


def serve_hints(manager: TokenizerManager) -> None:
    """Add the route to SGLang's HTTP server, if this process has one."""
    server = sys.modules.get("sglang.srt.entrypoints.http_server")
    if server is None:
        return
    from fastapi import Request
    from fastapi.responses import JSONResponse

    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def hint(request: Request) -> JSONResponse:
        try:
            # FastAPI's own answer to a wrong body would name files of the server.
            body = HintBody.model_validate_json(await request.body())
            message = await _message(manager, body, request)
        except ValueError as error:
            return JSONResponse({"error": {"message": _sentence(error)}}, status_code=400)
        manager.auto_create_handle_loop()
        manager._dispatch_to_scheduler(message)
        tokens = None if message.input_ids is None else len(message.input_ids)
        return JSONResponse({"outlook": message.outlook, "tokens": tokens}, status_code=202)

    # Annotations are strings here, and FastAPI would look up `Request` in this module's namespace.
    hint.__annotations__ = {"request": Request}
    schema = {"content": {"application/json": {"schema": HintBody.model_json_schema()}}}
    server.app.add_api_route(PATH, hint, methods=["POST"], openapi_extra={"requestBody": schema})


def _sentence(error: ValueError) -> str:
    """What is wrong with a request, for its client."""
    if not isinstance(error, ValidationError):
        return str(error)
    # Where a field has several types, the error that lies deepest is that of the type that was meant.
    worst = max(error.errors(include_url=False, include_input=False), key=lambda found: len(found["loc"]))
    place = ".".join(str(part) for part in worst["loc"] if isinstance(part, int) or part.isidentifier())
    message = worst["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


async def _message(manager: TokenizerManager, body: HintBody, request: Any) -> HintReqInput:
    message = HintReqInput(
        outlook=body.outlook, expect_in_s=body.expect_in_s or 0.0, conversation=body.conversation
    )
    if body.conversation is not None:
        return message
    generate = _from_messages(body, request) if body.messages is not None else _from_prompt(body)
    generate.normalize_batch_and_arguments()
    message.input_ids = array("q", await _tokenize(manager, generate))
    message.extra_key, message.cache_salt = generate.extra_key, generate.cache_salt
    return message


async def _tokenize(manager: TokenizerManager, generate: GenerateReqInput) -> list[int]:
    if generate.contains_mm_input():
        raise ValueError("a hint takes text only; give the 'id' of the last response as 'conversation'")
    tokens = generate.input_ids
    if tokens is None:
        if manager.tokenizer is None:
            raise ValueError("this server has no tokenizer; give token ids as 'prompt'")
        tokens, _ = await manager._tokenize_texts(generate.text, False)
    manager._validate_one_request(generate, tokens)
    return tokens


def _from_prompt(body: HintBody) -> GenerateReqInput:
    field = "text" if isinstance(body.prompt, str) else "input_ids"
    return GenerateReqInput(**{field: body.prompt}, extra_key=body.extra_key, cache_salt=body.cache_salt)


def _from_messages(body: HintBody, request: Any) -> GenerateReqInput:
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    ours = {"prompt", "conversation", "expect_in_s", "keep", "drop"}
    chat = ChatCompletionRequest(**body.model_dump(exclude=ours, exclude_none=True))
    generate, _ = request.app.state.openai_serving_chat._convert_to_internal_request(chat, request)
    return generate
