"""Imported last by the process that servers fork from: a full collection in each would traverse all of SGLang."""

import gc

gc.freeze()
