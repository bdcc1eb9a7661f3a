"""What does a conversation lose when it outgrows the context window?

    python -m benchmark.truncation_quality           # trains a small model, then compares: 6 minutes on one core
    python -m benchmark.truncation_quality --quick   # a minute, to see that it works; its numbers mean nothing

Trains a small language model with rotary positions on the text that comes with Python and the system, and
reads held-out text far beyond the window, truncated in several ways: docs/truncation.md explains them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmark.truncation.experiment import run
from benchmark.truncation.fact import Facts
from benchmark.truncation.figure import save_truncation
from benchmark.truncation.model import Shape
from benchmark.truncation.plan import Plan
from benchmark.truncation.report import (
    LOSSES_KEPT,
    context_table,
    controls,
    method_table,
    quoting_table,
    recall_table,
    truncation_table,
    verdict,
    write_json,
)
from benchmark.truncation.text import Document, cut_conversations, default_roots, read_documents
from benchmark.truncation.training import Recipe, Trained, train


@dataclass(frozen=True)
class Setting:
    """What is trained and what is read. `length`: tokens of a conversation."""

    recipe: Recipe
    length: int
    each: int
    """Most conversations from one held-out document."""
    document_share: int
    """One in this many documents is used."""


FULL = Setting(
    Recipe(
        Shape(
            vocabulary=1_024,
            hidden=128,
            intermediate=344,
            layers=3,
            heads=2,
            kv_heads=2,
            head_dim=64,
            window=256,
        ),
        steps=450,
        batch=16,
    ),
    length=512,
    each=2,
    document_share=1,
)
QUICK = Setting(
    Recipe(
        Shape(
            vocabulary=768, hidden=64, intermediate=128, layers=2, heads=2, kv_heads=1, head_dim=32, window=512
        ),
        steps=30,
        batch=4,
    ),
    length=1_024,
    each=1,
    document_share=12,
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, hardly trained, and little text")
    parser.add_argument("--steps", type=int, help="training steps; default: 450, quick: 30")
    parser.add_argument(
        "--model",
        type=Path,
        help="trained model: reused where it exists, else written; default: model.pt in --output",
    )
    parser.add_argument(
        "--text",
        type=Path,
        action="append",
        help="directory with text; default: Python's standard library and /usr/share/doc",
    )
    parser.add_argument("--per-document", type=int, help="conversations from a held-out document, at most")
    parser.add_argument("--page-size", type=int, default=16, help="tokens")
    parser.add_argument("--sink-pages", type=int, default=1, help="pages that stay at the start")
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path("out/truncation"), help="directory of what is written"
    )
    args = parser.parse_args(arguments)
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.sink_pages < 1:
        parser.error(f"--sink-pages must be at least 1, got {args.sink_pages}: every method but two keeps a sink")
    if args.per_document is not None and args.per_document < 1:
        parser.error(f"--per-document must be at least 1, got {args.per_document}")
    args.model = args.model or args.output / "model.pt"
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    try:
        compare(args)
    except ValueError as failure:
        print(f"truncation_quality: {failure}", file=sys.stderr)
        return 1
    return 0


def compare(args: argparse.Namespace) -> None:
    """Train or load, read, print and write; ValueError if the arguments do not fit together."""
    setting = QUICK if args.quick else FULL
    steps = args.steps or setting.recipe.steps
    recipe = Recipe(**{**vars(setting.recipe), "steps": steps, "seed": args.seed})
    plan = truncation_plan(recipe.shape, args.page_size, args.sink_pages)
    documents = read_documents(args.text or default_roots())[:: setting.document_share]
    trained = trained_model(args.model, recipe, documents, args.device)
    each = args.per_document or setting.each
    text = cut_conversations(trained.tokenizer, documents, setting.length, each)
    if not len(text.tokens):
        raise ValueError(f"no held-out document has {setting.length} tokens; give more text with --text")
    findings = run(trained.model.to(args.device), Facts.of(trained.tokenizer), text, plan, args.seed)
    console = Console()
    for table in (method_table, quoting_table, truncation_table, recall_table, context_table):
        console.print(table(findings))
    console.print(verdict(findings), highlight=False)
    for warning in controls(findings):
        console.print(f"But: {warning}", highlight=False)
    save_truncation(args.output / "truncation.png", findings)
    write_json(
        args.output / "truncation.json", {**vars(args), **asdict(plan)}, training(trained, documents), findings
    )
    console.print(f"saved truncation.json and truncation.png in {args.output}", highlight=False)


def truncation_plan(shape: Shape, page_size: int, sink_pages: int) -> Plan:
    """The window that overflows is half of the trained context, so that all of it can serve as the ceiling.

    Half of the window is dropped at a time: `--cached-attention-truncation-ratio 0.5`.
    """
    window = shape.window // 2
    if page_size < 1 or (window // 2) % page_size:
        raise ValueError(
            f"--page-size {page_size}: half of the window, {window // 2} tokens, must be whole pages"
        )
    return Plan(window, window // 2, sink_pages * page_size)


def trained_model(path: Path, recipe: Recipe, documents: list[Document], device: str) -> Trained:
    """The model in `path`, or a new one that is saved there; ValueError if `path` holds another one."""
    if not path.exists():
        trained = train(recipe, documents, device)
        trained.save(path)
        return trained
    trained = Trained.load(path)
    if trained.recipe != recipe:
        raise ValueError(
            f"{path} was trained by {trained.recipe}, wanted {recipe}; remove it or give another --model"
        )
    return trained


def training(trained: Trained, documents: list[Document]) -> dict[str, Any]:
    """How the model was trained; losses are thinned to a readable number."""
    held_out = [document for document in documents if document.held_out]
    steps = np.linspace(0, len(trained.losses) - 1, min(LOSSES_KEPT, len(trained.losses))).astype(int)
    return {
        "recipe": asdict(trained.recipe),
        "parameters": sum(weight.numel() for weight in trained.model.parameters()),
        "documents": len(documents) - len(held_out),
        "characters": sum(len(document.text) for document in documents if not document.held_out),
        "held_out_documents": [document.name for document in held_out],
        "tokens_read": trained.recipe.steps * trained.recipe.batch * trained.recipe.shape.window,
        "seconds": round(trained.seconds),
        "processor_seconds": round(trained.processor_seconds),
        "losses": {int(step): round(trained.losses[step], 4) for step in steps},
    }


if __name__ == "__main__":
    sys.exit(main())
