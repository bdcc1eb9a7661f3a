"""Entry point of group `sglang.srt.plugins`: runs in every SGLang process."""


def activate() -> None:
    pass
