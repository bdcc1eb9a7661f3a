"""Compiled code, built when it is first needed or ahead of time by `make kernels`."""
