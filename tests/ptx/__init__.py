"""A machine on the CPU for what compilers made: PTX for sm_90, one block of threads at a time.

The emulation in ``tests/cuda/emulation`` runs a kernel's source, with another implementation of its
primitives; here the PTX that nvcc and Triton give runs, inline assembly included. What it does not
have is ptxas, and timing. Semantics follow the PTX ISA, sections named in the modules:

* ``program.py``: text to instructions;
* ``memory.py``: tensors as global memory, shared memory;
* ``registers.py``, ``arithmetic.py``: a warp's registers, and the instructions between them;
* ``groups.py``: asynchronous work;
* ``transfers.py``: loads, stores and asynchronous copies;
* ``products.py``: matrix instructions;
* ``warp.py``: control flow and barriers of one warp; ``block.py``: all warps, in any order;
* ``cuda_kernels.py``, ``triton_kernels.py``: launches of this project's kernels on it.
"""
