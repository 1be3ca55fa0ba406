"""A stand-in for a machine with a GPU, so that all of ``make gpu-check`` can be tried without one.

``python -m tests.benchmarks.stand_in [ARGUMENTS OF gpu-check]`` starts the real command line. Every part is really
started with its real arguments, in a process of its own: pytest collects and selects the tests, fixtures and benchmark
bodies run, options are parsed, results files are written, and the tables at the end are made from them. It finds wrong
file names and options, ``-k`` expressions that select nothing, and errors in the code between the parts and the tables.

What is replaced, as low as possible:

- ``site/sitecustomize.py``, which every Python process imports at its start, makes torch report an H200. Tensors for it
  are on the CPU, streams and events do nothing, a CUDA graph is not replayed, and times are those of the host.
  The native module's CPU kernels and the reference compute what CUDA and Triton kernels would.
- Shapes have two images of 8 x 8, networks eight layers, epochs 16 images and comparisons two rounds. torch.compile
  checks its options only.
- Tests (not benchmarks) are selected and set up, and their bodies are left out.
- ``bin`` has nvcc, ninja, ncu, compute-sanitizer, cuobjdump and nvidia-smi. They check their options and start the
  program that they are given. nvcc compiles device.cu, and the program that it makes prints a sample.
- ``samples`` has output in the form in which torch's profiler, ncu and device.cu write it, with the names of this
  project's and torch's kernels. The forms are those of public examples; the numbers are invented.

What it cannot find: everything that only a device does. Those are kernels and their results, launches and captures that
fail, functions of torch.cuda that are used wrongly where the replacement takes any argument, options of ncu and
compute-sanitizer in other versions, output of tools that differs from the samples, and time limits that are too
short.
"""
