"""Makes vLLM take Model Runner V2 on a CPU, as it does on every GPU.

Python imports this before anything else, in all of an engine's processes, where this folder is on
``PYTHONPATH``. vLLM 0.32 has a CPU worker for that runner, and takes it where Triton is active; on
a CPU it asks for a backend of that name, which stock Triton lacks. Its interpreter needs none.
"""

import os
from types import SimpleNamespace

# Before Triton is imported: it decorates functions of its own.
os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

from triton.backends import backends


class Active:
    """A driver, as far as vLLM asks."""

    @staticmethod
    def is_active() -> bool:
        return True


backends["cpu"] = SimpleNamespace(driver=Active, compiler=None)
