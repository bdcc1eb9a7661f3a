"""LoRA adapters, told apart by content: their pages outlive the server, and adapters are trained again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import xxhash

FILES = ("*.json", "*.safetensors", "*.bin")
"""What an adapter consists of."""
BLOCK = 4096
BLOCKS = 256
"""Blocks of `BLOCK` bytes of a file that the digest reads, or two more: training changes all of the weights."""


def adapter_id(original: Callable[[str, str], str], lora_name: str, lora_path: str) -> str:
    """SGLang's id of an adapter, which becomes part of its pages' keys; differs if the files differ.

    The same on all machines that have the same files.
    """
    try:
        digest = adapter_digest(lora_path)
    except (OSError, ValueError):
        return original(lora_name, lora_path)  # SGLang is about to fail on it, and says why.
    return original(lora_name, f"{lora_path}\0{digest}")


def adapter_digest(path: str) -> str:
    """xxh3 over names, sizes and evenly spaced blocks of the files of an adapter.

    Args:
        path: its directory, or its name on the Hub.

    Raises:
        OSError, ValueError: there is no such adapter.
    """
    digest = xxhash.xxh3_128()
    directory = _directory(path)
    for file in sorted(file for pattern in FILES for file in directory.glob(pattern)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            for place in sorted({*range(0, size, max(BLOCK, size // BLOCKS)), max(0, size - BLOCK)}):
                opened.seek(place)
                digest.update(opened.read(BLOCK))
    return digest.hexdigest()


def _directory(path: str) -> Path:
    if (directory := Path(path)).is_dir():
        return directory
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=list(FILES)))  # As SGLang is about to do.
