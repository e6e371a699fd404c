"""Models and factors by their names on the Hugging Face hub, and in its cache without a network."""

import json
import os
import subprocess

import pytest
from huggingface_hub import constants
from vllm.engine.arg_utils import EngineArgs

from recalkv_vllm.serving.startup.errors import ServingError
from tests.e2e.conftest import BIN, run_engines
from tests.e2e.hub import Hub

RECALKV = {"attention_backend": "recalkv"}


@pytest.fixture(scope="module")
def base(make_small):
    return make_small("llama-mha-bias")


@pytest.fixture(scope="module")
def factors(base, compressed):
    return compressed(base, factors_only=True)


@pytest.fixture(scope="module")
def hub(base, factors, small, compressed, tmp_path_factory):
    """Factors of another base at ``main``, those of ``owner/base`` at ``v2``."""
    bare = tmp_path_factory.mktemp("bare")
    (bare / "config.json").symlink_to(factors / "config.json")
    with Hub() as running:
        running.add("owner/base", base)
        running.add("owner/compressed", compressed(base))
        running.add("owner/factors", compressed(small, factors_only=True))
        running.add("owner/factors", factors, revision="v2")
        running.add("owner/bare", bare)
        yield running


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


def overrides(factors, source, **revision):
    config = json.loads((factors / "config.json").read_text())
    return {
        "architectures": config["architectures"],
        "recalkv": {"factors": str(source), **revision},
    }


@pytest.fixture(scope="module")
def jobs(base, factors, small_prompts):
    by_name = overrides(factors, "owner/factors", revision="v2")
    return {
        "stock": small_prompts.job(base),
        "factors": small_prompts.job("owner/base", **RECALKV, hf_overrides=by_name),
        "compressed": small_prompts.job("owner/compressed", **RECALKV),
    }


@pytest.fixture(scope="module")
def answers(hub, cache, jobs):
    results = run_engines(*jobs.values(), HF_ENDPOINT=hub.url, HF_HUB_CACHE=str(cache))
    return dict(zip(jobs, results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["factors", "compressed"])
def test_tokens_of_what_the_hub_has(answers, name):
    assert answers[name]["tokens"] == answers["stock"]["tokens"]


@pytest.mark.slow
def test_tokens_of_what_is_cached_without_a_network(answers, cache, jobs):
    found = run_engines(
        jobs["factors"], jobs["compressed"], HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(cache)
    )
    assert [one["tokens"] for one in found] == [answers["stock"]["tokens"]] * 2


@pytest.fixture
def configure(hub, base, factors, tmp_path, monkeypatch):
    """``configure(source, revision)``: an engine's configuration with factors of the hub."""
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def create(source, **revision):
        arguments = {"enforce_eager": True, "hf_overrides": overrides(factors, source, **revision)}
        EngineArgs(model=str(base), **arguments).create_engine_config()

    return create


def test_revision_of_the_factors(configure):
    with pytest.raises(ServingError, match="factors of another base model: expected"):
        configure("owner/factors")
    configure("owner/factors", revision="v2")


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("owner/none", {}, "owner/none: expected a directory, or a model of the Hugging Face hub;"),
        ("owner/factors", {"revision": "v9"}, "owner/factors: .* hub at revision v9; found"),
        ("/no/such/directory", {}, "/no/such/directory: expected a directory, or a model"),
        ("owner/factors", {"revision": 2}, "--hf-overrides: recalkv: expected strings, found"),
        ("owner/bare", {}, "recalkv.safetensors: no such file; expected the factors"),
    ],
)
def test_what_the_hub_has_not(configure, source, revision, message):
    with pytest.raises(ServingError, match=message) as caught:
        configure(source, **revision)
    assert "\n" not in str(caught.value)


def test_vllm_serve_ends_with_one_line(base, factors, tmp_path):
    named = json.dumps(overrides(factors, "owner/none"))
    done = subprocess.run(
        [BIN / "vllm", "serve", base, "--hf-overrides", named],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)},
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "owner/none: expected a directory, or a model of the Hugging Face hub;" in last
