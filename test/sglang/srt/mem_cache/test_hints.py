"""Who may send a hint: whoever may call SGLang's own administrative endpoints."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sglang.srt.mem_cache.cached_attention import hints
from sglang.srt.utils.auth import AuthLevel, add_api_key_middleware, auth_level

USER, ADMIN, NOBODY = "the user's key", "the administrator's key", "another key"


class Manager:
    """Takes what would go to the schedulers."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def auto_create_handle_loop(self) -> None: ...

    def _dispatch_to_scheduler(self, message: Any) -> None:
        self.sent.append(message)


def statuses(monkeypatch: pytest.MonkeyPatch, api_key: str | None, admin_api_key: str | None) -> dict[str, int]:
    """Per key of a client, what it gets; the same as at an endpoint that SGLang marks as `/flush_cache`."""
    server = ModuleType("sglang.srt.entrypoints.http_server")
    server.app = app = FastAPI()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, server.__name__, server)
    manager: Any = Manager()
    hints.serve_hints(manager)

    @app.post("/flush_cache")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def flush_cache() -> None: ...

    if api_key or admin_api_key:
        add_api_key_middleware(app, api_key=api_key, admin_api_key=admin_api_key)
    client, body = TestClient(app), {"conversation": "x", "drop": True}
    found = {}
    for name, key in {"none": None, "nobody": NOBODY, "user": USER, "admin": ADMIN}.items():
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        sent = len(manager.sent)
        found[name] = client.post(hints.PATH, json=body, headers=headers).status_code
        assert len(manager.sent) - sent == (found[name] == 202)
        theirs = client.post("/flush_cache", headers=headers).status_code
        assert (theirs == 200) == (found[name] == 202)
    return found


@pytest.mark.parametrize(
    ("api_key", "admin_api_key", "allowed"),
    [
        (None, None, {"none", "nobody", "user", "admin"}),
        (USER, None, {"user"}),
        (None, ADMIN, {"admin"}),
        (USER, ADMIN, {"admin"}),
    ],
    ids=["no keys", "--api-key", "--admin-api-key", "both"],
)
def test_hints_are_as_closed_as_flush_cache(
    monkeypatch: pytest.MonkeyPatch, api_key: str | None, admin_api_key: str | None, allowed: set[str]
) -> None:
    found = statuses(monkeypatch, api_key, admin_api_key)
    assert {name for name, status in found.items() if status == 202} == allowed
    assert {status for name, status in found.items() if name not in allowed} <= {401}


def test_sglang_marks_its_own_endpoint_in_the_same_way() -> None:
    from sglang.srt.entrypoints import http_server

    levels = {getattr(route, "path", ""): getattr(route, "endpoint", None) for route in http_server.app.routes}
    assert levels["/flush_cache"]._auth_level is AuthLevel.ADMIN_OPTIONAL  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "Invalid JSON: EOF while parsing an object at line 1 column 1"),
        ("[]", "Input should be an object"),
        ('{"keep": true}', "give one of 'prompt', 'messages' and 'conversation'"),
        ('{"conversation": "x", "expect_in_s": "soon"}', "expect_in_s: Input should be a valid number"),
        ('{"prompt": [-1], "keep": true}', "prompt.0: Input should be greater than or equal to 0"),
    ],
)
def test_a_wrong_body_gets_one_sentence_without_names_of_files(
    monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    server = ModuleType("sglang.srt.entrypoints.http_server")
    server.app = app = FastAPI()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, server.__name__, server)
    hints.serve_hints(Manager())  # type: ignore[arg-type]
    answer = TestClient(app).post(hints.PATH, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)
    assert "\n" not in answer.text
    assert "hints.py" not in answer.text
