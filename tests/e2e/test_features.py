"""vLLM's features on a small model: what the stock engine answers, the compressed one does."""

import json
import random
from functools import cache

import pytest
import torch
from safetensors.torch import save_file

from tests.e2e.architectures import SIZES
from tests.e2e.conftest import run_engines
from tests.e2e.host_offloading import EXTRA_CONFIG as HOST_OFFLOADING

RECALKV = {"attention_backend": "recalkv"}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}
#: Modules with adapters: their sizes in and out.
ADAPTED = {"q_proj": (256, 256), "o_proj": (256, 256), "up_proj": (256, 256)}


def save_adapter(directory, modules):
    """A random LoRA adapter; ``modules`` name to its sizes in and out."""
    torch.manual_seed(1)
    directory.mkdir()
    config = {"r": 8, "lora_alpha": 16, "target_modules": list(modules), "peft_type": "LORA"}
    (directory / "adapter_config.json").write_text(
        json.dumps({**config, "task_type": "CAUSAL_LM", "bias": "none"})
    )
    tensors = {}
    for layer in range(SIZES["num_hidden_layers"]):
        for module, (inputs, outputs) in modules.items():
            parent = "mlp" if module == "up_proj" else "self_attn"
            name = f"base_model.model.model.layers.{layer}.{parent}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(8, inputs) * 0.3
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, 8) * 0.3
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@pytest.fixture(scope="module")
def both(small, compressed, small_prompts):
    """``both(*batches, **engine)``: results of the stock and of the compressed engine."""
    checkpoint = compressed(small)

    def run(*batches, **engine):
        # A process each: vLLM 0.32 starts no second engine after some of its features ran.
        return [
            run_engines(small_prompts.job(path, *batches, **options, **engine))[0]
            for path, options in ((small, {}), (checkpoint, RECALKV))
        ]

    return run


@pytest.fixture(scope="module")
def sampled(both, small_prompts):
    ids = small_prompts.ids
    # As good as greedy, which vLLM does not let several samples be.
    several = {"max_tokens": 12, "n": 3, "temperature": 0.01}
    return both(
        {"prompts": ids[:2], "sampling": several},
        {"prompts": ids[1:3], "beam": {"beam_width": 3, "max_tokens": 8, "ignore_eos": True}},
        {"prompts": ids[:2], "sampling": {"max_tokens": 8, "logprobs": 3, "prompt_logprobs": 2}},
        {"prompts": ids[1:3], "sampling": {"max_tokens": 60, "json_schema": SCHEMA}},
    )


def test_several_samples_of_a_prompt(sampled):
    stock, ours = (run["outputs"][0] for run in sampled)
    assert [len(answer["samples"]) for answer in ours] == [3, 3]
    assert [answer["samples"] for answer in ours] == [answer["samples"] for answer in stock]


def test_beam_search(sampled):
    stock, ours = (run["outputs"][1] for run in sampled)
    assert [len(beams) for beams in ours] == [3, 3]
    assert ours == stock


@pytest.mark.parametrize("kind", ["logprobs", "prompt_logprobs"])
def test_log_probabilities(sampled, kind):
    stock, ours = ([answer[kind] for answer in run["outputs"][2]] for run in sampled)
    for expected, found in zip(stock, ours, strict=True):
        for at_stock, at_ours in zip(expected, found, strict=True):
            assert at_ours == pytest.approx(at_stock, abs=1e-4)


def test_structured_output(sampled):
    stock, ours = (run["outputs"][3] for run in sampled)
    assert [answer["text"] for answer in ours] == [answer["text"] for answer in stock]
    # The same prompts without a schema continue otherwise: the grammar was at work.
    assert ours[0]["samples"] != sampled[1]["outputs"][2][1]["samples"]
    assert "{" in ours[0]["text"]


def test_ngram_speculation(both, small_prompts):
    # One token over and over: what the model goes on with repeats, too, and is predicted.
    repetition = [random.Random(3).randrange(3, SIZES["vocab_size"])] * 80
    speculation = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    greedy = {"max_tokens": 24, "ignore_eos": True}
    batch = {"prompts": [repetition, *small_prompts.ids], "sampling": greedy}
    stock, ours = both(batch, speculative_config=speculation)
    assert ours["tokens"] == stock["tokens"]
    assert ours["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 0


@pytest.mark.parametrize(
    ("base", "draft", "options"),
    [
        ("llama3-rope", "stock", {}),
        ("llama3-rope", "compressed", {}),
        # Windows on every other layer, of the model and of the draft.
        ("gemma3", "stock", {"disable_hybrid_kv_cache_manager": True}),
        ("gemma3", "compressed", {"disable_hybrid_kv_cache_manager": True}),
    ],
)
@pytest.mark.slow
def test_draft_model_speculation(make_small, compressed, small_prompts, base, draft, options):
    stock = make_small(base)
    checkpoint = compressed(stock)
    model = stock if draft == "stock" else checkpoint
    speculation = {"method": "draft_model", "model": str(model), "num_speculative_tokens": 3}
    alone, drafted = (
        run_engines(small_prompts.job(checkpoint, **RECALKV, **engine))[0]
        for engine in ({}, {"speculative_config": speculation, **options})
    )
    assert drafted["tokens"] == alone["tokens"]
    # The draft computes what the model does, so that every token is right.
    accepted = drafted["metrics"]["vllm:spec_decode_num_accepted_tokens"]
    assert accepted == drafted["metrics"]["vllm:spec_decode_num_draft_tokens"] > 0


def connector(name, **extra_config):
    return {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra_config}


@pytest.fixture(scope="module")
def transferred(small_prompts, tmp_path_factory):
    """``transferred(model, make)``: results of a prompt that comes again, others in between.

    ``make(store)`` makes the connector's configuration, with a folder of this engine's: the example
    connector tells prompts apart, not models.
    """
    greedy = {"max_tokens": 8, "ignore_eos": True}
    # In one step, or vLLM's example connector stores no more of it than its first chunk.
    prompts = [small_prompts.ids[0][:100]], small_prompts.ids[1:]
    again, others = ({"prompts": ids, "sampling": greedy} for ids in prompts)

    @cache
    def run(model, make):
        job = small_prompts.job(
            model,
            *(again, others, again),
            kv_transfer_config=make(str(tmp_path_factory.mktemp("store"))),
            enable_prefix_caching=False,
        )
        return run_engines(job)[0]

    return run


def example_connector(store):
    return connector("ExampleConnector", shared_storage_path=store)


def offloading_connector(_):
    return connector("OffloadingConnector", **HOST_OFFLOADING)


def both_connectors(store):
    parts = [example_connector(store), offloading_connector(store)]
    return connector("MultiConnector", connectors=parts)


@pytest.mark.parametrize("make", [example_connector, offloading_connector, both_connectors])
@pytest.mark.slow
def test_latents_go_through_kv_connectors(transferred, small, compressed, make):
    stock, ours = transferred(small, make), transferred(compressed(small), make)
    assert ours["tokens"] == stock["tokens"]
    assert ours["tokens"][0] == ours["tokens"][2]
    hits = [run["metrics"]["vllm:external_prefix_cache_hits"] for run in (stock, ours)]
    assert hits[0] == hits[1] > 0


@pytest.mark.slow
def test_offloading_moves_half_the_bytes_of_half_the_cache(transferred, small, compressed):
    half = compressed(small, compression=0.5)
    stock, ours = transferred(small, offloading_connector), transferred(half, offloading_connector)
    assert ours["tokens"][0] == ours["tokens"][2]
    for direction in ("store", "load"):
        name = f"vllm:kv_offload_{direction}_bytes"
        assert ours["metrics"][name] == stock["metrics"][name] / 2 > 0


@pytest.mark.slow
def test_lora_on_other_modules(small, compressed, small_prompts, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", ADAPTED)
    plain = {"prompts": small_prompts.ids, "sampling": {"max_tokens": 16}}
    stock, ours = (
        run_engines(
            small_prompts.job(
                path, plain, {**plain, "lora": str(adapter)}, enable_lora=True, max_lora_rank=8
            )
        )[0]
        for path in (small, compressed(small, k_group_size=1))
    )
    assert ours["tokens"] == stock["tokens"]
    assert ours["tokens"][0] != ours["tokens"][1]


def test_embedding(both, small_prompts):
    stock, ours = both(
        {"prompts": small_prompts.ids, "embed": True}, runner="pooling", convert="embed"
    )
    torch.testing.assert_close(
        torch.tensor(ours["outputs"][0]), torch.tensor(stock["outputs"][0]), rtol=0, atol=1e-4
    )


def test_context_longer_than_calibrated(small, compressed):
    """Calibrated on samples of 64 tokens; served with all 512 that the engine accepts."""
    draw = random.Random(9)
    prompt = [draw.randrange(3, SIZES["vocab_size"]) for _ in range(480)]
    batch = {"prompts": [prompt], "sampling": {"max_tokens": 24, "ignore_eos": True}}
    engine = {"max_model_len": 1024, "block_size": 32, "kv_cache_memory_bytes": 64 << 20}
    jobs = [
        {"engine": {**engine, "model": str(path), **options}, "batches": [batch]}
        for path, options in ((small, {}), (compressed(small), RECALKV))
    ]
    stock, ours = run_engines(*jobs)
    assert ours["tokens"] == stock["tokens"]


@pytest.mark.slow
def test_compiled_by_inductor(small, compressed, small_prompts):
    checkpoint = compressed(small)
    eager, compiled = (
        run_engines(small_prompts.job(checkpoint, **RECALKV, enforce_eager=value))[0]
        for value in (True, False)
    )
    assert compiled["tokens"] == eager["tokens"]
