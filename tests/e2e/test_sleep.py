"""Sleep and wake-up: what an engine answers before, it answers afterwards.

Kernels are those of a GPU, interpreted; the allocator is pretended (``pretend_sleep.py``).
"""

import pytest

from tests.e2e.conftest import run_engines

pytestmark = pytest.mark.slow

RECALKV = {"attention_backend": "recalkv"}
TRITON = {"RECALKV_KERNEL": "triton", "TRITON_INTERPRET": "1"}


@pytest.mark.parametrize("name", ["llama-mha-bias", "qwen3"])
def test_sleep_and_wake_up(make_small, compressed, small_prompts, name):
    """Level 1 saves weights, and kernels' constants with them; level 2 needs a reload."""
    base = make_small(name)
    again = {"prompts": small_prompts.ids[1:2], "sampling": {"max_tokens": 5, "ignore_eos": True}}
    batches = [again, {"sleep": 1}, again, {"sleep": 2}, again, {"reload": {}}, again]
    (stock,) = run_engines(small_prompts.job(base, again))
    job = small_prompts.job(compressed(base), *batches, enable_sleep_mode=True, **RECALKV)
    (ours,) = run_engines(job, **TRITON)
    assert ours["outputs"][5] is None
    first, _, after_1, _, gone, _, after_2 = ours["tokens"]
    assert first == after_1 == after_2 == stock["tokens"][0]
    # What had slept at level 2 was gone until then.
    assert gone != first
