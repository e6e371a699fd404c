"""CUDA graphs of attention: captured and replayed with metadata that vLLM itself builds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport

from recalkv_vllm.serving.attention.metadata import LatentMetadataBuilder

RUNNER_V2 = Path(__file__).parents[1] / "e2e" / "model_runner_v2"
MAX_MODEL_LEN = 1024


@pytest.fixture(scope="module")
def replays():
    """Of batches of some sizes, decodes and verification of two drafted tokens each."""
    folders = [str(RUNNER_V2), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.graph_metadata"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders), "RECALKV_KERNEL": "triton"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_every_batch_has_a_graph_and_some_are_padded(replays):
    assert [(each["queries"], each["requests"]) for each in replays] == [
        (queries, requests) for queries in (1, 3) for requests in (1, 3, 5, 8)
    ]
    for queries in (1, 3):
        padding = {
            each["padded requests"] - each["requests"]
            for each in replays
            if each["queries"] == queries
        }
        assert len(padding) > 1


def test_all_of_a_captured_batch_is_decodes_of_any_length(replays):
    for each in replays:
        captured, requests, queries = each["captured"], each["padded requests"], each["queries"]
        assert captured["decodes"] == requests
        assert captured["tokens"] == [requests * queries] * 2
        assert captured["queries"] == queries
        assert captured["longest"] == MAX_MODEL_LEN


def test_captured_metadata_shows_the_batch_of_a_replay(replays):
    """A graph reads what tensors hold when it is replayed: they must be the runner's own."""
    for each in replays:
        captured, replayed = each["captured"], each["replayed"]
        # What launches follow from is the graph's, whatever the batch, but for a shorter bound.
        assert replayed.pop("longest") == max(each["lengths"]) <= captured.pop("longest")
        assert replayed == captured
        padding = [0] * (each["padded requests"] - each["requests"])
        assert each["lengths shown"] == each["lengths"] + padding


def test_replayed_launches_attend_the_batch_and_clear_what_is_padded(replays):
    for each in replays:
        assert each["error"] < 1e-5, each


def test_one_batch_is_built_once_for_all_layers(replays):
    assert all(each["built once"] for each in replays)


@pytest.mark.parametrize(
    ("device", "forced", "threshold"),
    [("cpu", None, None), ("cpu", "cpu", None), ("cpu", "triton", 1), ("cuda", None, 1)],
)
def test_decodes_come_first_where_kernels_take_them_apart(device, forced, threshold, monkeypatch):
    monkeypatch.delenv("RECALKV_KERNEL", raising=False)
    if forced:
        monkeypatch.setenv("RECALKV_KERNEL", forced)
    config = SimpleNamespace(
        speculative_config=None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    builder = LatentMetadataBuilder(None, ["layer"], config, device)
    assert builder.reorder_batch_threshold == threshold


def test_the_reference_is_never_captured(monkeypatch):
    support = LatentMetadataBuilder.get_cudagraph_support
    assert support(None, None) is AttentionCGSupport.UNIFORM_BATCH
    monkeypatch.setenv("RECALKV_KERNEL", "reference")
    assert support(None, None) is AttentionCGSupport.NEVER


def test_a_drafter_gets_a_new_batch_for_every_step():
    """It changes lengths in place, by which work lists of a step before would be out of date."""
    builder = object.__new__(LatentMetadataBuilder)
    builder.reorder_batch_threshold = 1
    numbers = torch.arange(3, dtype=torch.int32)
    common = SimpleNamespace(
        max_query_len=1, num_reqs=2, num_actual_tokens=2, max_seq_len=9,
        query_start_loc=numbers, query_start_loc_cpu=numbers, seq_lens=numbers[1:],
        block_table_tensor=numbers[1:, None], seq_lens_cpu_upper_bound=None,
    )  # fmt: skip
    built = builder.build(0, common)
    assert built.batch.work_lists == {}
    assert builder.build(0, common) is built
    drafts = [builder.build_for_drafting(common, step) for step in range(2)]
    batches = [each.batch for each in (built, *drafts)]
    assert len({id(batch) for batch in batches}) == 3
    assert len({id(batch.work_lists) for batch in batches}) == 3
