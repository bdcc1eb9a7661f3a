"""`python -m cached_attention.kernels`: build the libraries that are shipped, ahead of time."""

from __future__ import annotations

from cached_attention.kernels.compilation import ALL_GPUS, SHIPPED, compile_library, library_name


def main() -> None:
    """Compile for the GPUs named in `ALL_GPUS` into `SHIPPED`; delete libraries of older sources.

    Raises:
        CompilationError: see its message.
    """
    SHIPPED.mkdir(exist_ok=True)
    library = SHIPPED / library_name(ALL_GPUS)
    if not library.exists():
        compile_library(ALL_GPUS, library)
    for other in SHIPPED.glob("kernels_*.so"):
        if other != library:
            other.unlink()
    print(f"{library}: {library.stat().st_size:,} bytes for sm_{ALL_GPUS.replace('_', ', sm_')}")


if __name__ == "__main__":
    main()
