"""All that ``recalkv env`` shows."""

from __future__ import annotations

import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from recalkv_vllm.cache_directory import cache_directory
from recalkv_vllm.environment.packages import packages
from recalkv_vllm.environment.probes import PROBES
from recalkv_vllm.environment.probing import probe

CPUINFO = Path("/proc/cpuinfo")
#: Flags of ``/proc/cpuinfo`` that kernels, ours or torch's, may ask for.
INSTRUCTION_SETS = ("avx", "amx", "fma", "f16c", "asimd", "sve", "bf16", "i8mm")
#: Variables that change what runs, and where. Others may be secret.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "RECALKV_CACHE",
    "RECALKV_CPU_ISA",
    "RECALKV_DEBUG",
    "RECALKV_KERNEL",
    "TRITON_INTERPRET",
    "VLLM_PLUGINS",
)
PLUGIN_GROUP, PLUGIN_NAME = "vllm.general_plugins", "recalkv"


def collect() -> dict[str, Any]:
    """What is here, and ``warnings``, a line for each thing that is not as it should be."""
    versions, warnings = packages()
    probed = probe(list(PROBES))
    for name, found in probed.items():
        # Of what is not installed, its missing version tells.
        if "error" in found and versions.get(name, {"version": ""})["version"] is not None:
            warnings.append(f"{name}: {found['error']}")
    devices = probed["kernels"].get("devices", [])
    forced = os.environ.get("RECALKV_KERNEL")
    for device in devices:
        for dtype in dict.fromkeys(row["dtype"] for row in device["kernels"]):
            if not any(row["serves"] for row in device["kernels"] if row["dtype"] == dtype):
                what = f"no kernels for {dtype} on {device['device']}"
                warnings.append(f"RECALKV_KERNEL={forced}: {what}" if forced else what)
    plugin, cache = _plugin(probed["plugin"]), _cache()
    warnings += [f"plugin: {plugin['error']}"] if plugin["error"] else []
    warnings += [f"cache: {cache['error']}"] if cache["error"] else []
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "cuda": probed["torch"].get("cuda"),
        "cpu": _cpu() | {"threads": probed["torch"].get("threads")},
        "devices": devices,
        "plugin": plugin,
        "cache": cache,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "warnings": list(dict.fromkeys(warnings)),
    }


def _cpu() -> dict[str, Any]:
    """Name and instruction sets, as the kernel of the operating system knows them."""
    fields: dict[str, str] = {}
    try:
        for line in CPUINFO.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "name": fields.get("model name") or platform.machine(),
        "instruction_sets": [flag for flag in flags if flag.startswith(INSTRUCTION_SETS)],
    }


def _plugin(probed: dict[str, Any]) -> dict[str, Any]:
    """Whether vLLM finds the plugin, by what name, and whether it works once it has."""
    entries = [e for e in metadata.entry_points(group=PLUGIN_GROUP) if e.name == PLUGIN_NAME]
    chosen = os.environ.get("VLLM_PLUGINS")
    error = probed.get("error")
    if not entries:
        error = f"no entry point {PLUGIN_NAME} in {PLUGIN_GROUP}; install the package with pip"
    elif chosen is not None and PLUGIN_NAME not in chosen.split(","):
        error = f"VLLM_PLUGINS={chosen} leaves {PLUGIN_NAME} out"
    return {
        "entry_point": entries[0].value if entries else None,
        "backend": probed.get("backend"),
        "error": error,
    }


def _cache() -> dict[str, str | None]:
    """The directory of what was measured, and why it cannot be written, if so."""
    path = None
    try:
        path = cache_directory()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, RuntimeError) as error:  # the latter where there is no home directory
        return {
            "path": None if path is None else str(path),
            "error": f"cannot be written ({error})",
        }
    return {"path": str(path), "error": None}
