"""SGLang on any machine without an accelerator, from the unmodified wheel."""


def activate() -> str | None:
    return None
