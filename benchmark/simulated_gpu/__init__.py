"""A GPU whose memory is host memory and whose streams are threads, for what calls CUDA through torch.

    python -m benchmark.simulated_gpu -m pytest test/cached_attention -k gpu
    python -m benchmark.simulated_gpu -m sglang.launch_server --attention-backend torch_native ...

Torch, SGLang and this package take it for a GPU: they run what they run on one, with torch's own allocators, streams
and events. Kernels are replaced: torch's operators by those of the CPU, this package's by their bodies, Triton's by
its interpreter. Work lags behind the threads that queue it, and with SIMULATED_GPU_DELAY (microseconds) some of it is
late, at random: what waits for too little reads or writes the wrong bytes.

It shows that the code for GPUs runs and keeps its order, and says nothing about speed. Without CUDA graphs, several
GPUs, and kernels of other libraries.
"""
