"""An agent tells the server when its tool call will return, so that its conversation is in host memory by then.

python examples/hint.py --base-url http://127.0.0.1:30000

Works with or without a disk tier; with one, the next turn finds its pages in host memory instead of on disk.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from typing import Any


class Client:
    """Client for one server: JSON over HTTP."""

    def __init__(self, base_url: str, api_key: str | None) -> None:
        self._base_url = base_url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(self._base_url + path, json.dumps(body).encode(), self._headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            answer: dict[str, Any] = json.loads(response.read())
        return answer

    def chat(self, messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
        """One turn; the answer is appended to `messages`."""
        body = {"model": "default", "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        answer = self.post("/v1/chat/completions", body | {"return_cached_tokens_details": True})
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"] or ""})
        return answer

    def expect(self, conversation: str, seconds: float) -> None:
        """Announce that the conversation whose last response has the id `conversation` continues in `seconds`."""
        self.post("/cached_attention/hint", {"conversation": conversation, "expect_in_s": seconds})

    def drop(self, messages: list[dict[str, str]]) -> None:
        """The conversation is over: forget it."""
        self.post("/cached_attention/hint", {"messages": messages, "drop": True})


def run_agent(client: Client, tool_seconds: float, max_tokens: int) -> None:
    """Two turns with a tool call between them."""
    messages = [
        {"role": "system", "content": "You plan ferry trips. You ask the timetable before you answer. " * 8},
        {"role": "user", "content": "How do I get to the island before noon, and back after the concert?"},
    ]
    first = client.chat(messages, max_tokens)
    client.expect(first["id"], tool_seconds)
    print(f"turn 1: {first['usage']['prompt_tokens']} prompt tokens; the tool takes {tool_seconds:g} s")
    time.sleep(tool_seconds)
    messages.append({"role": "user", "content": "Timetable: 08:10, 09:40, 11:05; back 22:15, 23:50."})
    second = client.chat(messages, max_tokens)
    tiers = (second.get("sglext") or {}).get("cached_tokens_details") or {}
    print(f"turn 2: {second['usage']['prompt_tokens']} prompt tokens, of which cached: {tiers}")
    client.drop(messages)
    print("dropped")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--api-key", help="the server's admin key, where it has one")
    parser.add_argument("--tool-seconds", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=24, help="length of an answer")
    args = parser.parse_args()
    try:
        run_agent(Client(args.base_url, args.api_key), args.tool_seconds, args.max_tokens)
    except urllib.error.HTTPError as refusal:
        print(f"{refusal.url} answered {refusal.code}: {refusal.read().decode()}", file=sys.stderr)
        return 1
    except OSError as failure:
        print(f"{args.base_url}: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
