"""Runs GPU kernels without a GPU: the PTX that compilers really emit, interpreted on the CPU.

From Triton or nvcc to a report, in the order of the work:

* `assembly`: PTX text to kernels of statements.
* `decode`: statements to numbered instructions over numbered registers.
* `machine`: compiles csrc/, the interpreter in C++, and calls it.
* `launch`: gives a kernel its arguments, runs it and raises `Faults` with all that was wrong.
* `triton_driver`: makes Triton launch here; `plugin` does so for a whole pytest run.
* `nvcc`: compiles CUDA C++ to PTX. `kept`: what was compiled stays in build/tests.

docs/gpu_tests.md says what this finds and what it cannot.
"""
