"""Runs vLLM engines in a process of their own: a list of jobs per line of stdin, their results as a
line of stdout, both JSON.

A job is ``{"engine": {LLM arguments}, "batches": [{"prompts": [[ids]], "sampling": {...}}]}``; its
result is ``{"tokens": [[[ids], ...], ...], "metrics": {name: value}, "outputs": [...]}``:
tokens are one list per batch and prompt, ``outputs`` what else a batch asked for. Besides
``sampling`` (arguments of ``SamplingParams``, ``json_schema`` among them) a batch may have
``beam`` (of ``BeamSearchParams``), ``embed: true``, or ``lora``, an adapter's directory;
``sampling`` and ``lora`` may be lists, with one for each prompt. ``images`` has a list for each
prompt of seeds, which random images are drawn from. With ``abort_after: n``, a batch's
first request is aborted once it has ``n`` tokens; results are the others'. With ``embeddings``, a
model's directory, prompts are given as its input embeddings.

A batch ``{"reload": {...}}`` reloads weights: from the model at ``path``, or as tensors sent from
the files ``send``, of names that match ``only``, after ``load_format`` was changed if it says so;
its output is the error, or null. ``{"sleep": level}`` lets the engine sleep and wake up, and
``{"save_sharded": folder}`` saves what each rank holds. ``{"until_files": [folder, n]}`` takes
steps until offloading has written ``n`` files.

Engines run one after the other in this process, which saves their start-up; a fresh process keeps
vLLM's global state away from the tests. With ``--fork``, the jobs of each line run in a child of
their own, which has imported vLLM already and nothing else.
"""

import gc
import json
import os
import re
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

# The engine in this process: five seconds to start instead of twenty.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def resolve_model_class(engine):
    """Import a model's class here; vLLM would start a process only to look at it."""
    from transformers.utils import cached_file
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    config = json.loads(Path(cached_file(engine["model"], "config.json")).read_text())
    config |= engine.get("hf_overrides", {})
    # vLLM has the classes of Qwen3.5 with and without a tower in one module.
    if "vision_config" in config or config["model_type"].startswith("qwen3_5"):
        from pretend_torchvision import pretend_torchvision

        pretend_torchvision()
    architectures = config["architectures"]
    if not ModelRegistry.models.keys() & architectures:
        # vLLM has no class of its own, and runs the model as transformers defines it.
        architectures = ["TransformersForCausalLM", "TransformersMoEForCausalLM"]
    for architecture in architectures:
        cls = ModelRegistry.models[architecture].load_model_cls()
        ModelRegistry.register_model(architecture, cls)


@contextmanager
def dense_prefill():
    """Every prompt is attended as dense keys and values; counts the calls of attention."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from recalkv_vllm.kernels.heuristics import reconstruction
    from recalkv_vllm.serving.attention import implementation
    from recalkv_vllm.serving.attention.flash_attention import FlashAttention
    from tests.flash_attention import flash

    calls = Counter()
    attend, merge = flash(3).attend, flash(3).merge

    def counting(**given):
        calls["causal" if given["causal"] else "earlier"] += 1
        return attend(**given)

    with (
        patch.object(implementation, "flash_attention", lambda *_: FlashAttention(counting, merge)),
        patch.object(reconstruction, "WORTHWHILE_BLOCKS", 0),
    ):
        yield calls


def weights_kept():
    """vLLM's layers for CPUs keep the weights that they have packed: they are to be saved."""
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm
    return patch.object(
        utils,
        "dispatch_cpu_unquantized_gemm",
        lambda layer, remove_weight: pack(layer, remove_weight=False),
    )


def run(job):
    # vLLM collects garbage eight times in an engine's life, a third of a second each, nearly all of
    # it for what was imported. Once is enough to free an engine.
    with patch.object(gc, "collect"):
        result = run_patched(job)
    gc.collect()
    return result


def run_patched(job):
    if any("save_sharded" in batch for batch in job["batches"]):
        with weights_kept():
            return run_engine(job)
    if job["engine"].get("enable_sleep_mode"):
        from pretend_sleep import sleep_mode

        with sleep_mode():
            return run_engine(job)
    transfer = job["engine"].get("kv_transfer_config") or {}
    if transfer.get("kv_connector") == "ExampleHiddenStatesConnector":
        from host_hidden_states import stored_at_once

        with stored_at_once():
            return run_engine(job)
    if not job.get("dense_prefill"):
        return run_engine(job)
    with dense_prefill() as calls:
        result = run_engine(job)
    result["metrics"]["dense_prefill"] = calls
    return result


def run_engine(job):
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    resolve_model_class(job["engine"])
    llm = LLM(
        **{
            "dtype": "float32",
            "enforce_eager": True,
            "disable_log_stats": False,
            "max_model_len": 2048,
            "kv_cache_memory_bytes": 256 << 20,
            **job["engine"],
        }
    )
    answers = [run_batch(llm, batch) for batch in job["batches"]]
    metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    cache = llm.llm_engine.vllm_config.cache_config
    metrics["kv_cache_tokens"] = cache.num_gpu_blocks * cache.block_size
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    metrics["kv_cache_groups"] = len(scheduler.kv_cache_config.kv_cache_groups)
    specs = [group.kv_cache_spec for group in scheduler.kv_cache_config.kv_cache_groups]
    metrics["kv_cache_pages"] = [(spec.block_size, spec.page_size_bytes) for spec in specs]
    metrics["model_runner_v2"] = llm.llm_engine.vllm_config.use_v2_model_runner
    del llm
    cleanup_dist_env_and_memory()
    tokens, outputs = zip(*answers, strict=True)
    return {"tokens": tokens, "outputs": outputs, "metrics": metrics}


def reload(llm, path=None, send=(), only="", load_format=None):
    """Reload weights; returns the error."""
    from safetensors.torch import load_file

    arguments = {} if path is None else {"weights_path": path}
    if send:
        tensors = {name: tensor for file in send for name, tensor in load_file(file).items()}
        names = [name for name in tensors if re.search(only, name)]
        arguments = {"weights_iterator": [(name, tensors[name]) for name in names]}
    if load_format is not None:
        llm.collective_rpc("update_config", args=({"load_config": {"load_format": load_format}},))
    # Cached latents are the old weights'.
    llm.reset_prefix_cache()
    try:
        llm.collective_rpc("reload_weights", kwargs=arguments)
    except ValueError as error:
        return str(error)


def run_batch(llm, batch):
    """A batch's first tokens per prompt, and its further outputs."""
    if "reload" in batch:
        return [], reload(llm, **batch["reload"])
    if "save_sharded" in batch:
        llm.llm_engine.engine_core.save_sharded_state(batch["save_sharded"])
        return [], None
    if "until_files" in batch:
        step_until_files(llm, *batch["until_files"])
        return [], None
    if "sleep" in batch:
        llm.sleep(level=batch["sleep"])
        llm.wake_up()
        return [], None
    from vllm.sampling_params import BeamSearchParams

    prompts = [{"prompt_token_ids": ids} for ids in batch["prompts"]]
    for prompt, seeds in zip(prompts, batch.get("images", ()), strict=False):
        prompt["multi_modal_data"] = {"image": [random_image(seed) for seed in seeds]}
    if "embeddings" in batch:
        prompts = embedded_prompts(batch["prompts"], batch["embeddings"])
    if batch.get("embed"):
        embedded = llm.embed(prompts, use_tqdm=False)
        return [], [output.outputs.embedding for output in embedded]
    if "beam" in batch:
        found = llm.beam_search(prompts, BeamSearchParams(**batch["beam"]))
        return [], [[sequence.tokens for sequence in output.sequences] for output in found]
    if "abort_after" in batch:
        return abort_first(llm, prompts, sampling_parameters(**batch["sampling"]), batch), []
    sampling, lora = batch["sampling"], batch.get("lora")
    generated = llm.generate(
        prompts,
        [sampling_parameters(**one) for one in sampling]
        if isinstance(sampling, list)
        else sampling_parameters(**sampling),
        lora_request=[adapter(one) for one in lora] if isinstance(lora, list) else adapter(lora),
        use_tqdm=False,
    )
    tokens = [list(output.outputs[0].token_ids) for output in generated]
    return tokens, [
        {
            "samples": [list(sample.token_ids) for sample in output.outputs],
            "text": output.outputs[0].text,
            "logprobs": likelihoods(output.outputs[0].logprobs),
            "prompt_logprobs": likelihoods(output.prompt_logprobs),
        }
        for output in generated
    ]


def step_until_files(llm, folder, count):
    """Offloading goes on in an engine's steps; prompts too short to be offloaded make some."""
    for _ in range(1000):
        if len([*Path(folder).rglob("*.bin")]) >= count:
            return
        llm.generate({"prompt_token_ids": [3]}, sampling_parameters(max_tokens=1), use_tqdm=False)
        time.sleep(0.1)
    raise TimeoutError(f"expected {count} files in {folder}")


def random_image(seed):
    """An image wider than high."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (60, 90 + 30 * seed, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def adapter(directory):
    from vllm.lora.request import LoRARequest

    return None if directory is None else LoRARequest("adapter", 1, directory)


def embedded_prompts(prompts, path):
    """Prompts as rows of the input embeddings of the model at ``path``."""
    from safetensors.torch import load_file

    rows = load_file(Path(path) / "model.safetensors")["model.embed_tokens.weight"]
    return [{"prompt_embeds": rows[ids]} for ids in prompts]


def abort_first(llm, prompts, sampling, batch):
    """Tokens of all prompts but the first, whose request goes while the others are under way."""
    engine = llm.llm_engine
    for name, prompt in enumerate(prompts):
        engine.add_request(str(name), prompt, sampling)
    tokens = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
            if output.request_id == "0" and len(tokens["0"]) == batch["abort_after"]:
                engine.abort_request(["0"])
    assert len(tokens.pop("0")) == batch["abort_after"]
    return [tokens[name] for name in sorted(tokens, key=int)]


def sampling_parameters(json_schema=None, **parameters):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    if json_schema is not None:
        parameters["structured_outputs"] = StructuredOutputsParams(json=json_schema)
    return SamplingParams(**{"temperature": 0, **parameters})


def likelihoods(positions):
    """Of vLLM's ``{token: Logprob}`` per position; None where it has none."""
    if positions is None:
        return None
    return [at and {str(token): found.logprob for token, found in at.items()} for at in positions]


def main(forks):
    results_to = os.dup(1)
    # vLLM logs to stdout; results alone may go there.
    os.dup2(2, 1)
    if forks:
        # Its import starts no thread, which a child would lack.
        from vllm import LLM  # noqa: F401
    with os.fdopen(results_to, "w") as out:
        for jobs in sys.stdin:
            if forks and (child := os.fork()):
                if os.waitpid(child, 0)[1]:
                    sys.exit(1)
                continue
            out.write(json.dumps([run(job) for job in json.loads(jobs)]) + "\n")
            out.flush()
            if forks:
                break


if __name__ == "__main__":
    main(forks="--fork" in sys.argv)
