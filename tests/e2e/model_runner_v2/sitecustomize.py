"""Makes vLLM take Model Runner V2 on a CPU, as it does on every GPU.

Python imports this before anything else, in all of an engine's processes, where this folder is on
``PYTHONPATH``. vLLM 0.32 has a CPU worker for that runner, and takes it where Triton is active; on
a CPU it asks for a backend of that name, which stock Triton lacks. Its interpreter needs none.
"""

import os
import runpy
from pathlib import Path
from types import SimpleNamespace

# Before Triton is imported: it decorates functions of its own.
os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

from triton.backends import backends
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


class Active:
    """A driver, as far as vLLM asks."""

    @staticmethod
    def is_active() -> bool:
        return True


backends["cpu"] = SimpleNamespace(driver=Active, compiler=None)


def masks_of_bool() -> None:
    """Works around Triton 3.6's interpreter, which refuses masks of integers.

    vLLM's kernels for structured output and for speculation have some. To go once none does.
    """
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def boolean(mask: TensorHandle) -> TensorHandle:
        return TensorHandle(mask.data.astype(bool), mask.dtype)

    def create_masked_load(self, pointers, mask, *rest):
        return load(self, pointers, boolean(mask), *rest)

    def create_masked_store(self, pointers, value, mask, *rest):
        return store(self, pointers, value, boolean(mask), *rest)

    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_masked_store = create_masked_store


masks_of_bool()
runpy.run_path(str(Path(__file__).parents[2] / "triton_interpreter.py"))
