"""Set before any test module, or what it imports, imports torch or Triton."""

import os
from importlib.metadata import PackageNotFoundError, version

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: one thread each, and no engine that binds all of them to the same.
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

import torch

if not torch.cuda.is_available():
    # Triton decides when its own library is imported whether kernels are interpreted.
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import settings


def mend_interpreter() -> None:
    """Triton 3.6's interpreter makes an integer of an array of one element, NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_lang_tensor


try:
    old_interpreter = version("triton").startswith("3.6.")
except PackageNotFoundError:
    old_interpreter = False
if old_interpreter and "TRITON_INTERPRET" in os.environ:
    mend_interpreter()

# The same examples in every run, so that a commit's outcome does not depend on luck. How many of a
# fuzzer's, and other ones in every run, are asked for by RECALKV_FUZZ_EXAMPLES.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile("random" if "RECALKV_FUZZ_EXAMPLES" in os.environ else "repeatable")
