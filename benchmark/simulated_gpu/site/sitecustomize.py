"""First in every process that is to see a simulated GPU."""

from benchmark.simulated_gpu.device import install

install()
