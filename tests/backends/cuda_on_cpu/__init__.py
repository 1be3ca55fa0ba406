"""The CUDA kernels of csrc/cuda on the host: compiled by the C++ compiler, each thread a fiber, under sanitizers.

``cuda_on_cpu.h`` lists the replacements of CUDA's keywords and functions. ``native`` builds and calls the kernels.
``sandbox`` runs checks in a process that has loaded the runtimes of the sanitizers.
"""
