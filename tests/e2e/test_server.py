"""A compressed model behind real HTTP: capacity, concurrency, abort, and the same perplexity."""

import ast
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from recalkv_vllm.benchmarks.vllm_server import VllmServer
from recalkv_vllm.checkpoint import (
    AttentionGeometry,
    RecalkvConfig,
    kv_bytes_per_token,
    read_hf_config,
)
from tests.e2e.conftest import EXAMPLES, run_example, run_recalkv
from tests.e2e.prompts import LONG_TEXT, QUESTIONS

KV_CACHE_BYTES = 256 << 20
ARGS = [
    "--enforce-eager",
    *("--dtype", "float32"),
    *("--max-model-len", "1024"),
    *("--kv-cache-memory-bytes", str(KV_CACHE_BYTES)),
    *("--attention-backend", "recalkv"),
]


@pytest.fixture(scope="module")
def server(half, tmp_path_factory):
    with VllmServer(half, ARGS, tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")


def ask(client, server, question, **options):
    options = {"max_completion_tokens": 16, "temperature": 0, **options}
    return client.chat.completions.create(
        model=server.model, messages=[{"role": "user", "content": question}], **options
    )


def metric(server, name, **labels):
    wanted = {f'{key}="{value}"' for key, value in labels.items()}
    pattern = rf"^{re.escape(name)}(?:{{([^}}]*)}})? (\S+)$"
    for found in re.finditer(pattern, server.metrics(), re.MULTILINE):
        if wanted <= set((found[1] or "").split(",")):
            return float(found[2])
    raise AssertionError(f"no metric {name} with {labels}")


def test_half_the_bytes_hold_twice_the_tokens(server, half):
    """And ``recalkv plan`` tells how many."""
    cache = ("--kv-cache-memory-bytes", KV_CACHE_BYTES, "--dtype", "float32", "--block-size", 128)
    plan = json.loads(run_recalkv("plan", half, *cache, "--max-model-len", 1024, "--json").stdout)
    assert server.kv_cache_tokens() == pytest.approx(
        plan["kv_cache_tokens"]["compressed"], rel=0.02
    )
    assert server.kv_cache_tokens() >= 1.95 * plan["kv_cache_tokens"]["dense"]


def test_metrics_of_compression(server, half):
    """Under the label that vLLM's own metrics have, so that dashboards can join them."""
    config = read_hf_config(half)
    recalkv, geometry = (
        RecalkvConfig.from_hf_config(config),
        AttentionGeometry.from_hf_config(config),
    )
    name = {"model_name": server.model}
    assert metric(server, "vllm:num_requests_running", **name) == 0
    how = {"method": recalkv.method, "compression": "0.5", "latent_dtype": "float32"}
    assert metric(server, "recalkv_info", **name, **how) == 1
    for cache, size in kv_bytes_per_token(recalkv, geometry, 4).items():
        found = metric(server, "recalkv_kv_cache_bytes_per_token", **name, cache=cache)
        assert found == size


def test_metrics_of_the_dashboard(server):
    """Every name and label that the dashboard, and the page about it, use is there."""
    root = EXAMPLES.parent
    dashboard = json.loads((root / "docker/grafana/dashboards/recalkv.json").read_text())
    used = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    names = set(re.findall(r"(?:vllm:|recalkv_)\w+", used))
    labels = set(re.findall(r"(\w+)=", used)) | set(re.findall(r"(?:by|ignoring) \((\w+)\)", used))
    page = (root / "docs" / "operations" / "dashboards.md").read_text()
    names |= set(re.findall(r"`((?:vllm:|recalkv_)\w+)", page)) - {"recalkv_vllm"}
    shown, shown_labels = set(), set()
    for family in text_string_to_metric_families(server.metrics()):
        shown |= {family.name, *(sample.name for sample in family.samples)}
        shown_labels |= {label for sample in family.samples for label in sample.labels}
    assert len(names) > 12
    assert not names - shown
    assert not labels - shown_labels


def test_concurrent_requests_get_the_answers_they_get_alone(server, client):
    alone = [ask(client, server, q).choices[0].message.content for q in QUESTIONS[:6]]
    with ThreadPoolExecutor(6) as pool:
        together = pool.map(lambda q: ask(client, server, q), QUESTIONS[:6])
    assert [answer.choices[0].message.content for answer in together] == alone
    assert all(alone)


def test_abort_frees_the_latents(server, client):
    before = metric(server, "vllm:generation_tokens_total")
    stream = ask(
        client,
        server,
        "Count to one thousand.",
        max_completion_tokens=900,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 60
    while metric(server, "vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert metric(server, "vllm:num_requests_running") == 0
    assert metric(server, "vllm:kv_cache_usage_perc") == 0
    assert metric(server, "vllm:generation_tokens_total") - before < 900
    assert ask(client, server, QUESTIONS[0]).choices[0].message.content


def test_example_of_an_openai_client(server):
    """``examples/openai_client.py``: a streamed chat, and then JSON of its schema."""
    streamed, city = run_example(sys.executable, EXAMPLES / "openai_client.py", server.url).rsplit(
        "\n", 2
    )[:2]
    assert len(streamed.split()) > 8
    assert {key: type(value) for key, value in ast.literal_eval(city).items()} == {
        "name": str,
        "capital": bool,
    }


def test_perplexity_is_the_same_in_transformers_and_through_the_cache(half, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(LONG_TEXT)
    options = ["--dataset", text, "--seq-len", 512, "--max-tokens", 1024]
    found = {
        engine: json.loads(run_recalkv("eval", half, *options, "--engine", engine, "--json").stdout)
        for engine in ("transformers", "vllm")
    }
    assert found["vllm"]["tokens"] == found["transformers"]["tokens"] > 1000
    # Transformers runs the dense products as written, rounded once more than the factors.
    assert found["vllm"]["perplexity"] == pytest.approx(
        found["transformers"]["perplexity"], rel=5e-3
    )
