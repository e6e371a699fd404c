"""The first thing that ``make gpu`` runs on a device, and that it would see a fault."""

from __future__ import annotations

import re

import pytest
import torch

from recalkv_vllm.benchmarks.geometries import GEOMETRIES
from recalkv_vllm.benchmarks.smoke import smoke
from recalkv_vllm.ops.triton import TritonLayer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMOLLM2 = GEOMETRIES["smollm2-135m"]


def faults(formats: tuple[str, ...]) -> dict[str, str | None]:
    return dict(smoke(DEVICE, torch.float32, SMOLLM2, formats))


def test_kernels_agree_with_the_reference() -> None:
    found = faults(("auto", "int4"))
    assert found["triton, auto"] is found["triton, int4"] is None
    assert str(found["cuda, auto"]).startswith("not here")  # float32


@pytest.mark.parametrize("fault", ["wrong", "nan", "raises"])
def test_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attend_heads = TritonLayer.attend_heads

    def faulty(self, *call):
        heads = attend_heads(self, *call)
        if fault == "raises":
            raise RuntimeError("out of resources:\n shared memory")
        return heads * (1.01 if fault == "wrong" else torch.nan)

    monkeypatch.setattr(TritonLayer, "attend_heads", faulty)
    message = faults(("auto",))["triton, auto"]
    wanted = "RuntimeError: out of resources: shared memory" if fault == "raises" else "relative"
    assert message is not None
    assert message.startswith(wanted)
    if fault == "wrong":
        # The first sequence's values are the largest, relative to which errors of all are small.
        assert message.count("of the sequences") == 1
        assert re.search(r"e-0[5-9] of value latents, \d\S*e-0[5-9] of log-sum-exps$", message)
