"""Draws the figures of the documentation from the code itself: `python -m docs.figures`.

Each SVG carries the data that it shows in its description, so that a test can tell when the code has moved on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cached_attention import admission
from cached_attention.index import PageKey
from cached_attention.layout import PageLayout
from cached_attention.position.truncation import TruncationRule
from cached_attention.simulator.clock import Clock
from cached_attention.simulator.cost import Cost
from cached_attention.simulator.policies import POLICIES
from cached_attention.simulator.request import Request
from cached_attention.simulator.store import SimulatedStore

DIRECTORY = Path(__file__).with_name("figures")
BLUE, ORANGE, GREEN, GREY = "#3b6fb6", "#e08a3c", "#4a9b6e", "#c9ced6"
STYLE: Any = {"svg.fonttype": "path", "svg.hashsalt": "docs", "font.size": 10, "axes.spines.top": False}


# The record of one page

LLAMA_8B = {"layers": 32, "kv_heads": 8, "head_dim": 128, "element_bytes": 2}


def page_layout() -> dict[str, Any]:
    """Where each layer's K and V lie in the record of a page of Llama-3-8B: bytes."""
    shape, page_size = LLAMA_8B, 64
    component = page_size * shape["kv_heads"] * shape["head_dim"] * shape["element_bytes"]
    layout = PageLayout(page_size, ((component, component),) * shape["layers"])
    return {
        "page_size": page_size,
        "page_bytes": layout.page_bytes,
        "stride": layout.stride,
        "component_bytes": component,
        "offsets": layout.offsets(),
    }


def draw_page_layout(data: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    axes = figure.subplots()
    size, offsets = data["component_bytes"], data["offsets"]
    for layer, (k, v) in enumerate(offsets):
        for offset, colour in ((k, BLUE), (v, ORANGE)):
            axes.add_patch(Rectangle((offset, 0), size, 0.8, facecolor=colour, edgecolor="white", linewidth=0.6))
        if layer % 8 == 0 or layer == len(offsets) - 1:
            axes.text(k + size, 0.88, f"layer {layer}", ha="center", va="bottom", fontsize=9)
    (k, v), width = offsets[0], data["page_bytes"] / 2
    for place, (name, colour) in enumerate((("K", BLUE), ("V", ORANGE))):
        left = place * width
        axes.add_patch(Rectangle((left, 1.9), width, 0.8, facecolor=colour, edgecolor="white"))
        heads = f"{LLAMA_8B['kv_heads']} heads x {LLAMA_8B['head_dim']} x {LLAMA_8B['element_bytes']} bytes"
        text = f"layer 0, {name}: {data['page_size']} tokens x {heads} = {size // 1024} KiB"
        axes.text(left + width / 2, 2.3, text, ha="center", va="center", color="white", fontsize=9)
    for start, end in ((k, 0), (v + size, 2 * width)):
        axes.plot([start, end], [0.8, 1.9], color="#888888", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, data["page_bytes"])
    axes.set_ylim(-0.1, 2.75)
    ticks = [i * data["page_bytes"] // 8 for i in range(9)]
    axes.set_xticks(ticks, [f"{tick >> 20} MiB" for tick in ticks])
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)
    return figure


# Who leaves host memory first

CONVERSATIONS = {"A": None, "B": 1, "C": 0, "D": None}
"""Name -> place in the waiting queue; used in this order, a minute apart."""
PAGES = 6
SHARED = 1
"""Pages that all of them begin with."""


def eviction_order() -> dict[str, Any]:
    """The order in which the pages of four conversations leave host memory, two of which are waited for."""
    clock = Clock()
    chains = {name: _chain(name) for name in CONVERSATIONS}
    capacity = SHARED + len(chains) * (PAGES - SHARED)
    policy = POLICIES["ours"]
    store = SimulatedStore(policy, policy.make([]), capacity, page_tokens=64, cost=Cost(), clock=clock)
    for keys in chains.values():
        clock.now += 60
        store.save(keys)
    waiting = sorted((place, name) for name, place in CONVERSATIONS.items() if place is not None)
    for _, name in waiting:
        store.arrive(Request(name, clock.now, tuple(chains[name]), PAGES, 64 * PAGES, 1))
    keys = list(dict.fromkeys(key for chain in chains.values() for key in chain))
    order: list[str] = []
    held = set(keys)
    for number in range(capacity):
        # Stays pinned, as a page does that is being saved: it cannot be the one to leave.
        admission.admit(store.pages, b"new %d" % number, None, 0)
        gone = [key for key in keys if key in held and not store.pages.is_kept(key)]
        order += [key.decode() for key in gone]
        held -= set(gone)
    return {
        "chains": {name: [key.decode() for key in chain] for name, chain in chains.items()},
        "waiting": [name for _, name in waiting],
        "order": order,
    }


def _chain(name: str) -> list[PageKey]:
    shared = [f"page {page}".encode() for page in range(SHARED)]
    return shared + [f"{name}, page {page}".encode() for page in range(SHARED, PAGES)]


def draw_eviction_order(data: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    axes = figure.subplots()
    left = {key: place + 1 for place, key in enumerate(data["order"])}
    for row, (name, keys) in enumerate(data["chains"].items()):
        for page, key in enumerate(keys):
            if page < SHARED:
                continue
            _cell(axes, page, row, left[key], BLUE if name in data["waiting"] else GREY)
    rows = len(data["chains"])
    for page in range(SHARED):
        shared = next(iter(data["chains"].values()))[page]
        axes.add_patch(Rectangle((page, 0), 0.94, rows - 0.06, facecolor=GREEN))
        axes.text(page + 0.47, rows / 2, str(left[shared]), ha="center", va="center", color="white", fontsize=13)
    labels = []
    for minutes, name in zip(range(rows, 0, -1), data["chains"], strict=True):
        place = data["waiting"].index(name) + 1 if name in data["waiting"] else None
        wait = f"waits, number {place} in the queue" if place else "nobody waits for it"
        labels.append(f"{name}, used {minutes} min ago: {wait}")
    axes.set_yticks([row + 0.47 for row in range(rows)], labels)
    axes.set_xticks([page + 0.47 for page in range(PAGES)], [f"page {page}" for page in range(PAGES)])
    axes.set_xlim(0, PAGES)
    axes.set_ylim(rows, 0)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)
    return figure


def _cell(axes: Axes, page: int, row: int, place: int, colour: str) -> None:
    axes.add_patch(Rectangle((page, row), 0.94, 0.94, facecolor=colour))
    dark = colour == GREY
    text = "black" if dark else "white"
    axes.text(page + 0.47, row + 0.47, str(place), ha="center", va="center", color=text, fontsize=13)


# What stays of a prompt that outgrew the window


def truncation() -> dict[str, Any]:
    """What goes of a conversation as it grows, under the defaults, with a window of 8,192 tokens."""
    rule = TruncationRule(window=8192, limit=8192, page_size=64, ratio=0.5, sink_pages=1)
    plans = {length: rule.plan(length) for length in range(1024, 24576, 128)}
    return {
        "window": rule.window,
        "sink": rule.sink,
        "step": rule.step,
        "lengths": list(plans),
        "dropped": [plan.dropped for plan in plans.values()],
    }


def draw_truncation(data: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots()
    lengths, sink = data["lengths"], data["sink"]
    seam = [sink + dropped for dropped in data["dropped"]]
    style: dict[str, Any] = {"step": "post", "linewidth": 0}
    axes.fill_between(lengths, seam, lengths, color=BLUE, label="kept: the most recent tokens", **style)
    axes.fill_between(lengths, sink, seam, color=GREY, label="dropped", **style)
    # One page is too thin to see: drawn as a line of its own.
    axes.axhline(sink / 2, color=ORANGE, linewidth=3, label=f"kept: the sink, {sink} tokens")
    for length, before, after in zip(lengths[1:], data["dropped"], data["dropped"][1:], strict=False):
        if after > before:
            axes.axvline(length, color="black", linewidth=0.6, linestyle=":")
            note = f"{length - after:,} tokens stay"
            axes.annotate(note, (length, length), (-4, 2), textcoords="offset points", ha="right", fontsize=9)
    axes.set_xlabel("tokens of the conversation")
    axes.set_ylabel("token")
    axes.set_xlim(lengths[0], lengths[-1])
    axes.set_ylim(0, lengths[-1])
    ticks = range(0, lengths[-1] + 1, data["step"])
    axes.set_xticks(ticks[1:], [f"{tick:,}" for tick in ticks[1:]])
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.legend(loc="upper left", frameon=False)
    axes.spines["right"].set_visible(False)
    return figure


FIGURES: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], Figure]]] = {
    "page-layout": (page_layout, draw_page_layout),
    "eviction-order": (eviction_order, draw_eviction_order),
    "truncation": (truncation, draw_truncation),
}


def main() -> None:
    DIRECTORY.mkdir(exist_ok=True)
    for name, (data_of, draw) in FIGURES.items():
        data = data_of()
        path = DIRECTORY / f"{name}.svg"
        with rc_context(STYLE):
            figure = draw(data)
            figure.savefig(path, metadata={"Date": None, "Description": json.dumps(data, separators=(",", ":"))})
        print(path)


if __name__ == "__main__":
    main()
