"""Imported last by what servers are forked from: a full collection in each of them would walk all of SGLang."""

import gc

gc.freeze()
