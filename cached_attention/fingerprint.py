"""What decides, besides the tokens, whether a page's bytes may be reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

FORMAT_VERSION = 1
"""Version of the page record and the stores that hold it; changes when old bytes become unusable."""


@dataclass(frozen=True)
class Fingerprint:
    """Pages with equal fingerprints are interchangeable; others must never be mixed.

    All values are plain JSON. An in-place weight update must change `weights`.
    """

    model: str
    """Name or path, as given by the operator."""
    weights: str
    """Identity of the weights: revision, digest, or a count of updates."""
    kv_dtype: str
    page_size: int
    """Tokens per page."""
    component_bytes: tuple[tuple[int, ...], ...]
    """Bytes of one page on this rank, per layer and component (K and V, or a latent)."""
    ranks: Mapping[str, int]
    """Which part of the model this rank holds, e.g. `{"tp_rank": 0, "tp_size": 2}`."""
    rope: Mapping[str, Any]
    """Parameters of the rotation applied to the stored keys."""
    other: Mapping[str, Any] = field(default_factory=dict)
    """Anything else that the engine knows to matter, e.g. KV scales or the attention backend."""
    format_version: int = FORMAT_VERSION

    @property
    def page_bytes(self) -> int:
        """Bytes of a page record without padding."""
        return sum(map(sum, self.component_bytes))

    @property
    def encryption(self) -> str | None:
        """Id of the key that the store is encrypted with; None: not encrypted."""
        return self.other.get("encryption")

    def encrypted(self, key_id: str) -> Fingerprint:
        """Fingerprint for a separate store of the same pages, encrypted with this key."""
        return replace(self, other={**self.other, "encryption": key_id})

    def to_json(self) -> str:
        """Canonical JSON: equal fingerprints give equal text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Fingerprint:
        """The inverse of `to_json`.

        Raises:
            ValueError: not JSON, or not the JSON of a fingerprint.
        """
        values = json.loads(text)
        try:
            layers = tuple(tuple(map(int, layer)) for layer in values.pop("component_bytes"))
            return cls(component_bytes=layers, **values)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a fingerprint: {error}") from error

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def name(self) -> str:
        """Short name, usable as a directory name."""
        return self.digest()[:16]

    def describe(self) -> dict[str, str]:
        """Human-readable properties."""
        layers = self.component_bytes
        return {
            "model": self.model,
            "weights": self.weights,
            "KV dtype": self.kv_dtype,
            "page": f"{self.page_size} tokens, {self.page_bytes:,} bytes, {len(layers)} layers",
            "ranks": _words(self.ranks),
            "RoPE": _words(self.rope),
            "encryption": "none" if self.encryption is None else f"AES-256-GCM, key {self.encryption}",
            "other": _words({name: value for name, value in self.other.items() if name != "encryption"}),
            "format": f"version {self.format_version}",
        }


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(values.items())) or "none"
