"""Set before any test module, or what it imports, imports torch or Triton."""

import os
from importlib.util import find_spec
from itertools import islice
from unittest.mock import patch

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: one thread each, and no engine that binds all of them to the same.
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

import torch

if not torch.cuda.is_available():
    # Triton decides when its own library is imported whether kernels are interpreted.
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import settings

from recalkv_vllm.compression.calibration import builtin_text, text

if "TRITON_INTERPRET" in os.environ and find_spec("triton"):
    import tests.triton_interpreter  # noqa: F401

# The same examples in every run, so that a commit's outcome does not depend on luck. How many of a
# fuzzer's, and other ones in every run, are asked for by RECALKV_FUZZ_EXAMPLES.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile("random" if "RECALKV_FUZZ_EXAMPLES" in os.environ else "repeatable")


@pytest.fixture(scope="session", autouse=True)
def little_text():
    """A seventh of the built-in text: each compression makes tokens of all that there is."""
    little = lambda: islice(builtin_text.builtin_documents(), 20)  # noqa: E731
    with patch.object(text, "builtin_documents", little):
        yield
