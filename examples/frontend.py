"""A program in SGLang's frontend language: a conversation that forks and continues.

    python examples/frontend.py --base-url http://127.0.0.1:30000

Forks share a prefix, so the server computes it once. With CachedAttention it stays available after the device has
evicted it, however long the program pauses between two calls.
"""

# mypy sees this repository's part of the sglang package only.
# mypy: disable-error-code="attr-defined,name-defined"

from __future__ import annotations

import argparse
import sys
from urllib.error import URLError

import sglang as sgl
from sglang.lang.interpreter import ProgramState

BRIEFING = (
    "A small harbour has forty berths, numbered from the lighthouse. Berths one to eight are for fishing boats, "
    "nine to twenty for sailing boats, the others for guests who stay a night or two. The pilot speaks to every "
    "captain before a storm and writes the hour into the log book. "
)
ASPECTS = ("fishing boats", "sailing boats", "guests")


@sgl.function
def advise(s: ProgramState, max_tokens: int) -> None:
    """One question per aspect, asked in parallel on forks, then a summary of all answers."""
    s += BRIEFING
    s += "What should the pilot say first?" + sgl.gen("opening", max_tokens=max_tokens, ignore_eos=True)
    branches = s.fork(len(ASPECTS))
    for branch, aspect in zip(branches, ASPECTS, strict=True):
        branch += f"\nWhat should the pilot say to {aspect}?"
        branch += sgl.gen("advice", max_tokens=max_tokens, ignore_eos=True)
    branches.join()
    for branch, aspect in zip(branches, ASPECTS, strict=True):
        s += f"\nTo {aspect}:" + branch["advice"]
    s += "\nIn one sentence:" + sgl.gen("summary", max_tokens=max_tokens, ignore_eos=True)
    s["branch_cached_tokens"] = [branch.get_meta_info("advice")["cached_tokens"] for branch in branches]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--max-tokens", type=int, default=16, help="length of an answer")
    args = parser.parse_args()
    try:
        sgl.set_default_backend(sgl.RuntimeEndpoint(args.base_url))
    except URLError as failure:
        print(f"{args.base_url}: {failure}", file=sys.stderr)
        return 1
    state = advise.run(max_tokens=args.max_tokens, temperature=0)
    print(state.text())
    if state.error() is not None:
        print(f"the program failed: {state.error()}", file=sys.stderr)
        return 1
    summary = state.get_meta_info("summary")["cached_tokens"]
    branches = state["branch_cached_tokens"]
    print(f"branches: cached_tokens={branches}\nsummary: cached_tokens={summary}")
    if not summary or not all(branches):
        print("a branch or the summary reused nothing of the shared beginning", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
