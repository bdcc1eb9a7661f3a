"""Compiled code, built on first use or ahead of time by `make kernels`."""
