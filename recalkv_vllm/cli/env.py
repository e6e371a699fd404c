"""``recalkv env``: versions, devices, kernels and the plugin, as bug reports need them."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the sub-command's parser."""
    return commands.add_parser(
        "env",
        help="show versions, devices, and which kernels run on them",
        description="Show what is installed, which kernels run on which device or why they do "
        "not, and whether vLLM finds the plugin. What is broken becomes a line; nothing makes the "
        "command fail.",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the sub-command; the JSON object."""
    from recalkv_vllm.environment.collect import collect

    return collect()


def show(result: dict[str, Any]) -> None:
    """Print the result for people: plain lines, to be pasted."""
    for name, package in result["packages"].items():
        expected = f"  (tried or required: {package['expected']})" if package["expected"] else ""
        print(f"{name + ':':14} {package['version'] or 'not installed'}{expected}")
    print(f"{'Python:':14} {result['python']}, {result['platform']}")
    print(f"{'CUDA of torch:':14} {result['cuda'] or 'none'}")
    cpu = result["cpu"]
    sets = " ".join(cpu["instruction_sets"]) or "no instruction sets known"
    print(f"{'CPU:':14} {cpu['name']}, {cpu['threads'] or '?'} threads; {sets}")
    for device in result["devices"]:
        print(_device(device))
        for line in _kernels(device["kernels"]):
            print(f"  {line}")
    plugin = result["plugin"]
    where = plugin["backend"] and f"registers {plugin['backend']}"
    print(f"{'plugin:':14} {plugin['error'] or where}")
    print(f"{'cache:':14} {result['cache']['path']}")
    for name, value in result["variables"].items():
        print(f"{name}={value}")
    for warning in result["warnings"]:
        print(f"warning: {warning}")


def _device(device: dict[str, Any]) -> str:
    if "name" not in device:
        return f"kernels on {device['device']}:"
    return (
        f"kernels on {device['device']} ({device['name']}, compute capability "
        f"{device['compute_capability']}, {device['memory_bytes'] / 2**30:.0f} GiB):"
    )


def _kernels(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each implementation and all dtypes that it says the same of."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        said = f"no: {row['reason']}" if row["reason"] else row["description"]
        if row["serves"]:
            said += " (serves)"
        lines.setdefault((row["kernels"], said), []).append(row["dtype"])
    ordered = sorted(lines, key=lambda line: [row["kernels"] for row in rows].index(line[0]))
    return [f"{name:9} {', '.join(lines[name, said])}: {said}" for name, said in ordered]
