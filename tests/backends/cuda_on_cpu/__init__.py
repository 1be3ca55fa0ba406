"""The CUDA kernels of csrc/cuda on the host: compiled by the C++ compiler, each thread a fiber, under sanitizers.

``cuda_on_cpu.h`` says what takes the place of CUDA's words, ``native`` builds and calls, ``sandbox`` runs checks in a
process that has the sanitizers' runtime.
"""
