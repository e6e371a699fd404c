"""The files in ``examples/``, each as a user runs it, on the real model.

``openai_client.py`` runs in ``test_server.py``, whose server is up.
"""

import json
import sys

import pytest

from tests.e2e.conftest import EXAMPLES, run_example, run_recalkv

TESTED = {
    "benchmark.sh",
    "compress_from_python.py",
    "factors_only.py",
    "offline_inference.py",
    "openai_client.py",
}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.iterdir()} == {*TESTED, "README.md"}


@pytest.mark.slow
def test_compress_from_python(small, tmp_path):
    """On a small model, for speed: the others need what it writes to answer well."""
    out = tmp_path / "out"
    printed = run_example(sys.executable, EXAMPLES / "compress_from_python.py", small, out)
    assert f"{out}: " in printed
    assert (out / "recalkv.safetensors").is_file()


@pytest.mark.slow
def test_offline_inference(half):
    printed = run_example(sys.executable, EXAMPLES / "offline_inference.py", half)
    answer = printed.partition("What is photosynthesis?\n")[2].partition("\n\n")[0]
    assert len(answer.split()) > 8


@pytest.mark.slow
def test_factors_only(model, tmp_path):
    few = ("--dataset", "builtin", "--num-samples", 8, "--seq-len", 128)
    factors = tmp_path / "factors"
    run_recalkv("compress", model, "-o", factors, "--compression", 0.5, "--factors-only", *few)
    printed = run_example(sys.executable, EXAMPLES / "factors_only.py", model, factors)
    assert len(printed.partition("The sea is")[2].split()) > 5


@pytest.mark.slow
def test_benchmark(model, half, tmp_path):
    """With short requests, and in a type that every CPU computes in."""
    few = ("--workload", "chat", "--dtype", "float32")
    run_example("sh", EXAMPLES / "benchmark.sh", half, model, *few, cwd=tmp_path)
    result = json.loads((tmp_path / "bench-serve" / "result.json").read_text())
    assert not result["partial"]
    assert {row["server"] for row in result["rows"]} == {"stock", half.name}
