"""Multi-turn chat through the OpenAI client; prints what each turn took from the cache.

python examples/chat_openai.py --base-url http://127.0.0.1:30000
python examples/chat_openai.py --message "Who are you?" --message "And who am I?"
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from openai import OpenAI, OpenAIError
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

SYSTEM = (
    "You are the clerk of a small harbour. You know every boat by name, its berth, its draught and the hour of "
    "its last departure. You answer in one or two short sentences, you never guess, and you say so when the "
    "log book holds no entry. The harbour has forty berths, numbered from the lighthouse; berths one to eight "
    "are for fishing boats, nine to twenty for sailing boats, the others for guests who stay a night or two."
)
MESSAGES = [
    "Which berths may a guest use?",
    "My draught is two metres. Is that a problem?",
    "Thank you, goodbye.",
]


def cached_tokens(answer: ChatCompletion) -> dict[str, int]:
    """Cached prompt tokens by tier; SGLang sends them in a field outside OpenAI's schema."""
    extension: dict[str, Any] = (answer.model_extra or {}).get("sglext") or {}
    details = extension.get("cached_tokens_details") or {}
    return {tier: tokens for tier, tokens in details.items() if isinstance(tokens, int)}


def chat(client: OpenAI, messages: list[str], max_tokens: int) -> list[int]:
    """Send the messages one after another in one conversation; returns the cached prompt tokens of each turn."""
    # Nothing identifies the conversation: the server recognises it by its prefix. So the client sends the whole
    # conversation each time, unchanged, and only the new message has to be computed.
    conversation: list[ChatCompletionMessageParam] = [{"role": "system", "content": SYSTEM}]
    reused = []
    for message in messages:
        conversation.append({"role": "user", "content": message})
        answer = client.chat.completions.create(
            model="default",
            messages=conversation,
            temperature=0,
            max_tokens=max_tokens,
            extra_body={"return_cached_tokens_details": True},
        )
        reply = answer.choices[0].message.content or ""
        conversation.append({"role": "assistant", "content": reply})
        tiers = cached_tokens(answer)
        reused.append(sum(tiers.values()))
        prompt = answer.usage.prompt_tokens if answer.usage else 0
        print(f"user: {message}\nassistant:{reply}\nprompt_tokens={prompt} cached_tokens={reused[-1]} {tiers}\n")
    return reused


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--max-tokens", type=int, default=24, help="length of an answer")
    parser.add_argument("--message", action="append", help="what the user says; may be repeated")
    args = parser.parse_args()
    client = OpenAI(base_url=f"{args.base_url.rstrip('/')}/v1", api_key=args.api_key)
    try:
        reused = chat(client, args.message or MESSAGES, args.max_tokens)
    except OpenAIError as failure:
        print(f"{args.base_url}: {failure}", file=sys.stderr)
        return 1
    if len(reused) > 1 and not any(reused[1:]):
        print("no later turn reused anything: does the server run with --disable-radix-cache?", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
