"""Trains the small language model and saves it to a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from benchmark.truncation.fact import WORDS, Facts
from benchmark.truncation.model import LanguageModel, Shape
from benchmark.truncation.quote import quoting
from benchmark.truncation.text import Document, begin_of, token_stream, train_tokenizer

# One in this many documents trains the tokenizer: more text hardly changes 1,024 tokens.
TOKENIZER_SHARE = 4


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. Lengths in tokens; one step reads `batch` windows."""

    shape: Shape
    steps: int
    batch: int
    seed: int = 0
    matrix_rate: float = 0.01
    """Learning rate of the matrices (Muon), in units of their own size."""
    other_rate: float = 0.004
    """Learning rate of the embedding and the norms (AdamW)."""
    warm_up: int = 30
    cool_down: float = 0.5
    """Share of the steps, at the end, in which the rates fall to zero."""
    with_facts: float = 0.3
    """Share of the windows with facts mixed in."""
    with_quotes: float = 0.3
    """Share of the windows that repeat parts of themselves."""
    facts: int = 6
    asked: int = 2


@dataclass
class Trained:
    """A model, its tokenizer, and how it was trained."""

    model: LanguageModel
    tokenizer: Tokenizer
    recipe: Recipe
    losses: list[float] = field(default_factory=list)
    """Mean loss of every step, nats per token."""
    seconds: float = 0.0
    processor_seconds: float = 0.0

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "recipe": asdict(self.recipe),
            "tokenizer": self.tokenizer.to_str(),
            "weights": self.model.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
        }
        torch.save(content, path)

    @classmethod
    def load(cls, path: Path) -> Trained:
        """Load the model in `path` to the CPU; ValueError if the file holds something else."""
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or "recipe" not in content:
            raise ValueError(f"{path} is not a model of this benchmark; give another --model, or remove the file")
        recipe = Recipe(**{**content["recipe"], "shape": Shape(**content["recipe"]["shape"])})
        model = LanguageModel(recipe.shape)
        model.load_state_dict(content["weights"])
        tokenizer = Tokenizer.from_str(content["tokenizer"])
        return cls(
            model.eval(), tokenizer, recipe, content["losses"], content["seconds"], content["processor_seconds"]
        )


def train(recipe: Recipe, documents: list[Document], device: str = "cpu") -> Trained:
    """Train a model by `recipe` on the `documents` that are not held out."""
    read = [document for document in documents if not document.held_out]
    tokenizer = train_tokenizer(read[::TOKENIZER_SHARE], recipe.shape.vocabulary, WORDS)
    stream = token_stream(tokenizer, read)
    torch.manual_seed(recipe.seed)
    trained = Trained(LanguageModel(recipe.shape).to(device), tokenizer, recipe)
    started, used = time.monotonic(), time.process_time()
    trained.losses = _run(trained, stream, device)
    trained.seconds, trained.processor_seconds = time.monotonic() - started, time.process_time() - used
    trained.model.eval()
    return trained


def windows(
    stream: np.ndarray, recipe: Recipe, begin: int, facts: Facts, source: np.random.Generator
) -> Iterator[np.ndarray]:
    """Endless `[window + 1]` pieces of `stream`, each after a `begin`, some with facts or repetitions."""
    length = recipe.shape.window + 1
    while True:
        place = source.integers(0, len(stream) - length)
        piece = stream[place : place + length].astype(np.int64)
        piece[0] = begin
        kind = source.random()
        if kind < recipe.with_facts:
            piece = facts.mixed_into(piece, source, recipe.facts, recipe.asked)
        elif kind < recipe.with_facts + recipe.with_quotes:
            piece = quoting(piece, source)
        yield piece


def _run(trained: Trained, stream: np.ndarray, device: str) -> list[float]:
    recipe, model = trained.recipe, trained.model
    begin, facts = begin_of(trained.tokenizer), Facts.of(trained.tokenizer)
    pieces = windows(stream, recipe, begin, facts, np.random.default_rng(recipe.seed))
    positions = torch.arange(recipe.shape.window, device=device)
    optimizers = _optimizers(model, recipe)
    losses = []
    with tqdm(total=recipe.steps, desc="training", unit="step") as progress:
        for step in range(recipe.steps):
            batch = torch.from_numpy(np.stack([next(pieces) for _ in range(recipe.batch)])).to(device)
            loss = _loss(model, batch, positions)
            loss.backward()
            _advance(optimizers, _share_of_rate(step, recipe))
            losses.append(loss.item())
            progress.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}", refresh=False)
            progress.update()
    return losses


def _loss(model: LanguageModel, batch: Tensor, positions: Tensor) -> Tensor:
    logits, _ = model(batch[:, :-1], positions)
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def _optimizers(model: LanguageModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices = [weight for weight in model.blocks.parameters() if weight.dim() == 2]
    others = [model.embedding.weight, *(weight for weight in model.parameters() if weight.dim() == 1)]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _advance(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * share
        optimizer.step()
        optimizer.zero_grad()


def _share_of_rate(step: int, recipe: Recipe) -> float:
    rising = (step + 1) / (recipe.warm_up + 1)
    falling = (recipe.steps - step) / (recipe.cool_down * recipe.steps)
    return min(1.0, rising, falling)
