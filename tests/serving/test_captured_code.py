"""What a CUDA graph may capture reads nothing from the device on the host.

The reference reads lengths; its backend declares that it is never captured. C++ on the CPU has
nothing to capture.
"""

import ast

import pytest

from recalkv_vllm.ops import dispatch
from tests.test_imports import import_graph, sources

#: Where a captured forward pass enters: the layer, vLLM's two opaque ops, and the ops on a GPU.
ENTRIES = (
    "recalkv_vllm.serving.model.self_attention",
    "recalkv_vllm.serving.attention.backend",
    *(dispatch.MODULES[name] for name in dispatch.PREFERENCE["cuda"]),
)
#: Runs when weights are loaded; layers are built by its layouts.
LOADING = "recalkv_vllm.checkpoint"
#: They wait for the device.
READING = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize"}
#: What vLLM keeps on the host says so by its name.
ON_THE_HOST = "_cpu"
#: Called when the user asks for checks of values alone, and before graphs are captured.
NOT_CAPTURED = {"_check_values", "milliseconds"}


FILES = sources()


def captured() -> list[str]:
    """Every module that the entries import, by way of others too."""
    graph = import_graph(FILES)
    reached, left = set(), list(ENTRIES)
    while left:
        name = left.pop()
        if name in graph and name not in reached and not name.startswith(LOADING):
            reached.add(name)
            left += graph[name]
    return sorted(reached)


CAPTURED = captured()


def test_every_layer_of_the_path_is_reached():
    assert set(ENTRIES) <= set(CAPTURED)
    for name in (
        "serving.attention.metadata",
        "ops.checked",
        "ops.validation.calls",
        "ops.triton.launch",
        "ops.workspace",
        "kernels.attention",
        "kernels.heuristics.choice",
    ):
        assert f"recalkv_vllm.{name}" in CAPTURED


@pytest.mark.parametrize("name", CAPTURED, ids=lambda name: name.removeprefix("recalkv_vllm."))
def test_nothing_is_read_from_the_device(name):
    path = FILES[name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    elsewhere = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name in NOT_CAPTURED
        for node in ast.walk(function)
    }
    calls = [
        f"{path.name}:{node.lineno}: .{node.func.attr}()"
        for node in set(ast.walk(tree)) - elsewhere
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in READING
        and ON_THE_HOST not in ast.unparse(node.func.value)
    ]
    assert calls == []
