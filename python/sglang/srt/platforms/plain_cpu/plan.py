"""What one forward's attention reads: slots, query blocks and masks, built once and used by every layer."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

QUERY_BLOCK = 256
# Limits the mask, which has one row per query and query head of a KV head: 32 MiB in bf16.
MAX_MASK_ELEMENTS = 1 << 24
# Sequences share a padded decode batch if the shortest has at least this share of the longest's keys.
MIN_FILL = 0.75


class Request(NamedTuple):
    """One sequence of the batch: its row in `req_to_token`, number of new tokens, number of all tokens."""

    pool_row: int
    q_len: int
    kv_len: int


class LayerKind(NamedTuple):
    """What layers must have in common to share slots and masks. `window`: tokens visible before the query."""

    window: int | None
    group: int
    sliding_pool: bool
    dtype: torch.dtype


class Block(NamedTuple):
    """Queries of a span and the keys that they may see, both relative to the span; mask [rows, keys]."""

    queries: slice
    keys: slice
    mask: torch.Tensor | None


class Span(NamedTuple):
    """A sequence with several new tokens: their place in the batch, and the slots [keys] that it reads."""

    tokens: slice
    slots: torch.Tensor
    blocks: list[Block]


class SingleBatch(NamedTuple):
    """Sequences with one new token each: slots [sequences, keys], mask [sequences, 1, 1, keys] or None."""

    tokens: slice | torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor | None


class LayerWork(NamedTuple):
    spans: list[Span]
    singles: list[SingleBatch]


class ForwardPlan:
    """Slots and masks for the batch of one forward.

    Args:
        requests: sequences in batch order.
        req_to_token: [rows, context] slot of each token, int32 or int64.
    """

    def __init__(self, requests: Sequence[Request], req_to_token: torch.Tensor) -> None:
        self.requests = requests
        self.num_tokens = sum(request.q_len for request in requests)
        self._req_to_token = req_to_token
        self._work: dict[LayerKind, LayerWork] = {}

    def work(self, kind: LayerKind, translation: torch.Tensor | None = None) -> LayerWork:
        """Slots, blocks and masks for layers of `kind`.

        Args:
            kind: kind of the layers.
            translation: [slots] full slot -> slot of the layer's own pool; None where they are the same.
        """
        if kind not in self._work:
            spans = list(self._spans(kind, translation))
            self._work[kind] = LayerWork(spans, list(self._singles(kind, translation)))
        return self._work[kind]

    def _tokens(self) -> Iterator[tuple[int, Request]]:
        start = 0
        for request in self.requests:
            yield start, request
            start += request.q_len

    def _slots(self, request: Request, window: int | None, translation: torch.Tensor | None) -> torch.Tensor:
        prefix = request.kv_len - request.q_len
        first = 0 if window is None else max(0, prefix - window)
        slots = self._req_to_token[request.pool_row, first : request.kv_len]
        return slots if translation is None else translation[slots]

    def _spans(self, kind: LayerKind, translation: torch.Tensor | None) -> Iterator[Span]:
        chosen = [(start, request) for start, request in self._tokens() if request.q_len > 1]
        slots = [self._slots(request, kind.window, translation) for _, request in chosen]
        template = _Template(kind, [len(s) for s in slots], [request.q_len for _, request in chosen])
        for (start, request), own in zip(chosen, slots, strict=True):
            blocks = list(template.blocks(request.q_len, len(own)))
            yield Span(slice(start, start + request.q_len), own, blocks)

    def _singles(self, kind: LayerKind, translation: torch.Tensor | None) -> Iterator[SingleBatch]:
        found = [
            (start, self._slots(request, kind.window, translation))
            for start, request in self._tokens()
            if request.q_len == 1
        ]
        found.sort(key=lambda item: -len(item[1]))
        batch: list[tuple[int, torch.Tensor]] = []
        for item in found:
            if batch and len(item[1]) < MIN_FILL * len(batch[0][1]):
                yield _single_batch(batch, kind.dtype)
                batch = []
            batch.append(item)
        if batch:
            yield _single_batch(batch, kind.dtype)


class _Template:
    """One mask for all blocks of a forward.

    Whether a query sees a key depends only on their distance, so with rows and columns aligned at their last
    query and key every block's mask is a view of the largest one.
    """

    def __init__(self, kind: LayerKind, kv_lens: Sequence[int], q_lens: Sequence[int]) -> None:
        self._kind = kind
        self._width = max(kv_lens, default=0)
        widest = MAX_MASK_ELEMENTS // max(1, kind.group * self._width)
        self._height = min(max(q_lens, default=0), QUERY_BLOCK, max(widest, 1))
        self._mask: torch.Tensor | None = None

    def blocks(self, q_len: int, kv_len: int) -> Iterator[Block]:
        if q_len == kv_len and self._kind.window is None:
            yield Block(slice(0, q_len), slice(0, kv_len), None)
            return
        prefix = kv_len - q_len
        for start in range(0, q_len, self._height):
            stop = min(start + self._height, q_len)
            first = 0 if self._kind.window is None else max(0, prefix + start - self._kind.window)
            keys = slice(first, prefix + stop)
            yield Block(slice(start, stop), keys, self._view(stop - start, keys.stop - keys.start))

    def _view(self, queries: int, keys: int) -> torch.Tensor:
        if self._mask is None:
            self._mask = self._build()
        return self._mask[(self._height - queries) * self._kind.group :, self._width - keys :]

    def _build(self) -> torch.Tensor:
        distance = torch.arange(self._height)[:, None] - torch.arange(self._width) + self._width - self._height
        hidden = distance < 0
        if self._kind.window is not None:
            hidden |= distance > self._kind.window
        mask = torch.zeros(hidden.shape, dtype=self._kind.dtype).masked_fill_(hidden, float("-inf"))
        return mask.repeat_interleave(self._kind.group, 0)


def _single_batch(items: list[tuple[int, torch.Tensor]], dtype: torch.dtype) -> SingleBatch:
    items = sorted(items, key=lambda item: item[0])
    tokens = [token for token, _ in items]
    lengths = [len(slots) for _, slots in items]
    width = max(lengths)
    padded = torch.empty(len(items), width, dtype=items[0][1].dtype)
    for row, (_, slots) in zip(padded, items, strict=True):
        row[: len(slots)] = slots
        # A slot of the sequence itself: a foreign one may hold non-finite values, and NaN survives a mask.
        row[len(slots) :] = slots[0]
    mask = None
    if min(lengths) < width:
        beyond = torch.arange(width) >= torch.tensor(lengths)[:, None]
        mask = torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, float("-inf"))[:, None, None]
    consecutive = tokens[-1] - tokens[0] == len(tokens) - 1
    where = slice(tokens[0], tokens[-1] + 1) if consecutive else torch.tensor(tokens)
    return SingleBatch(where, padded, mask)
