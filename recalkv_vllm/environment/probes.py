"""What only an import shows: ``python -m recalkv_vllm.environment.probes NAME ...``.

A line of JSON for each: what was found, or ``{"error": LINE}``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")


def torch() -> dict[str, Any]:
    """CUDA release of the build, and what it knows of the processor."""
    import torch

    return {
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "instruction_sets": sorted(n for n, has in torch.cpu.get_capabilities().items() if has),
    }


def transformers() -> dict[str, Any]:
    """Nothing but that it works: most of it loads on use, and so do faults of what it needs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    return {}


def triton() -> dict[str, Any]:
    """Its backends."""
    from triton.backends import backends

    return {"backends": sorted(backends)}


def kernels() -> dict[str, Any]:
    """Devices, and which implementations of the ops run there."""
    import torch

    devices: list[dict[str, Any]] = [{"device": "cpu"}]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        capability = f"{about.major}.{about.minor}"
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": about.name,
                "compute_capability": capability,
                "memory_bytes": about.total_memory,
            }
        )
    return {"devices": [device | {"kernels": _kernels_of(device["device"])} for device in devices]}


def _kernels_of(device: str) -> list[dict[str, Any]]:
    """One row for each dtype and implementation."""
    from recalkv_vllm.ops import dispatch

    rows = []
    for dtype in DTYPES:
        found = {name: _implementation(name, device, dtype) for name in dispatch.MODULES}
        candidates = dispatch.candidates(device.partition(":")[0])
        serving = next((name for name in candidates if found[name]["reason"] is None), None)
        rows += [
            {"kernels": name, "dtype": dtype, **row, "serves": name == serving}
            for name, row in found.items()
        ]
    return rows


def _implementation(name: str, device: str, dtype: str) -> dict[str, str | None]:
    import torch

    from recalkv_vllm.ops import dispatch

    where = torch.device(device), getattr(torch, dtype)
    try:
        module, reason = dispatch.look_up(name, *where)
        described = None if module is None else module.describe(*where)
    except Exception as error:  # of a broken Triton, anything
        described, reason = None, _line(error)
    return {"description": described, "reason": reason}


def vllm() -> dict[str, Any]:
    """The platform that vLLM serves on here."""
    from vllm.platforms import current_platform

    return {"platform": current_platform.device_name}


def plugin() -> dict[str, Any]:
    """The backend's class, once the plugin has registered it."""
    import recalkv_vllm
    from recalkv_vllm.serving.names import BACKEND_NAME

    recalkv_vllm.register()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return {"backend": AttentionBackendEnum[BACKEND_NAME].get_class().__module__}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    probe.__name__: probe for probe in (torch, transformers, triton, kernels, vllm, plugin)
}


def main(names: Sequence[str]) -> None:
    """Run the probes; libraries may print what they like, it goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in names:
        try:
            found = PROBES[name]()
        except (Exception, SystemExit) as error:
            found = {"error": _line(error)}
        print(json.dumps(found), file=out, flush=True)


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


if __name__ == "__main__":
    main(sys.argv[1:])
