"""A GPU whose memory is host memory and whose streams are threads, for code that uses CUDA through torch.

    python -m benchmark.simulated_gpu -m pytest test/cached_attention -m gpu
    python -m benchmark.simulated_gpu -m benchmark.gpu overlap --shape tiny

Torch, SGLang and this package take it for a real one: they take the same branches, with torch's own allocators,
streams and events. Only kernels are replaced: torch's operators by the CPU's, this package's kernels by their
bodies, and Triton's by its interpreter. All work is queued and runs after the call that queued it has returned.
With a delay, some transfers and some waits between streams are late, at random, so that whatever waits for too
little reads or writes wrong bytes.

It shows that the code for GPUs runs and orders its work, also in CUDA graphs, which record work and run it again.
It says nothing about speed. There is no second GPU, and there are no kernels of other libraries.
"""
