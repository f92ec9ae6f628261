"""The operators as Triton kernels, for CUDA devices; their torch counterparts, which say what each computes, lie one
level up.

A kernel sees raw addresses, so the functions that launch one are the place where shapes and strides are agreed on. What
a model fixes (head size, block size, window) is a `constexpr`, compiled in; what changes from step to step is not, or
is excluded from specialisation, so that serving never stops to compile.
"""

from __future__ import annotations

import os

# Triton 3.9 warns, and 3.10 rounds between a product and a sum, unless told; ours may be one instruction.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
