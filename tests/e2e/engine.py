"""Runs vLLM engines in a process of their own: jobs on stdin, results on stdout, both JSON.

A job is ``{"engine": {LLM arguments}, "batches": [{"prompts": [[ids]], "sampling": {...}}]}``; its
result is ``{"tokens": [[[ids], ...], ...], "metrics": {name: value}}``
(one list per batch and prompt).
Engines run one after the other in this process, which saves their start-up; a fresh process keeps
vLLM's global state away from the tests.
"""

import json
import os
import sys

# The engine in this process: five seconds to start instead of twenty.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def run(job):
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        dtype="float32",
        enforce_eager=True,
        disable_log_stats=False,
        **{"max_model_len": 2048, "kv_cache_memory_bytes": 256 << 20, **job["engine"]},
    )
    tokens = []
    for batch in job["batches"]:
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in batch["prompts"]],
            SamplingParams(temperature=0, **batch["sampling"]),
            use_tqdm=False,
        )
        tokens.append([list(output.outputs[0].token_ids) for output in outputs])
    metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    del llm
    cleanup_dist_env_and_memory()
    return {"tokens": tokens, "metrics": metrics}


if __name__ == "__main__":
    results_to = os.dup(1)
    # vLLM logs to stdout; results alone may go there.
    os.dup2(2, 1)
    results = [run(job) for job in json.load(sys.stdin)]
    with os.fdopen(results_to, "w") as out:
        json.dump(results, out)
