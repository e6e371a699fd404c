"""What a CUDA graph may capture reads nothing from the device on the host.

The reference reads lengths; its backend declares that it is never captured. C++ on the CPU has
nothing to capture.
"""

import ast
from pathlib import Path

import pytest

import recalkv_vllm

PACKAGE = Path(recalkv_vllm.__file__).parent
KERNELS = PACKAGE.parent / "kernels"
CAPTURED = (
    *sorted((PACKAGE / "serving" / "attention").glob("[!_]*.py")),
    PACKAGE / "serving" / "model" / "self_attention.py",
    PACKAGE / "serving" / "model" / "factor_layers.py",
    *(PACKAGE / name for name in ("band_format.py", "latent_format.py", "span.py")),
    *(PACKAGE / "ops" / name for name in ("checked.py", "contract.py", "workspace.py")),
    *sorted((PACKAGE / "ops" / "validation").glob("*.py")),
    *sorted((PACKAGE / "ops" / "triton").glob("*.py")),
    *sorted((PACKAGE / "ops" / "cuda").glob("*.py")),
    *sorted(KERNELS.rglob("*.py")),
)
#: They wait for the device.
READING = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize"}
#: Called when the user asks for checks of values alone.
DEBUGGING = {"_check_values"}


@pytest.mark.parametrize("path", CAPTURED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_is_read_from_the_device(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    debugging = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name in DEBUGGING
        for node in ast.walk(function)
    }
    calls = [
        f"{path.name}:{node.lineno}: .{node.func.attr}()"
        for node in set(ast.walk(tree)) - debugging
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in READING
    ]
    assert calls == []
