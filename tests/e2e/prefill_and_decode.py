"""Prefills prompts in one engine and continues them in another, which takes the pages over NIXL.

Reads ``{"engine": {LLM arguments}, "prompts": [[ids]], "sampling": {...}}`` from stdin; all that it
prints is ``{"tokens": [[ids], ...], "metrics": {name: value}}`` of the second engine.
"""

import json
import os
import socket
import sys

TRANSFER = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(engine):
    """An engine in a process of its own: both are asked and answer at once."""
    from vllm import LLM

    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(free_port())
    return LLM(
        dtype="float32",
        enforce_eager=True,
        disable_log_stats=False,
        kv_transfer_config=TRANSFER,
        **engine,
    )


def main(engine, prompts, sampling):
    from vllm import SamplingParams

    prefiller, decoder = start(engine), start(engine)
    prompts = [{"prompt_token_ids": ids} for ids in prompts]
    remote = {"do_remote_decode": True, "do_remote_prefill": False}
    one = SamplingParams(temperature=0, max_tokens=1, extra_args={"kv_transfer_params": remote})
    prefilled = prefiller.generate(prompts, one, use_tqdm=False)
    generated = decoder.generate(
        prompts,
        [
            SamplingParams(
                temperature=0, extra_args={"kv_transfer_params": at.kv_transfer_params}, **sampling
            )
            for at in prefilled
        ],
        use_tqdm=False,
    )
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in generated],
        "metrics": {m.name: m.value for m in decoder.get_metrics() if hasattr(m, "value")},
    }


if __name__ == "__main__":
    result_to = os.dup(1)
    # vLLM logs to stdout; the result alone may go there.
    os.dup2(2, 1)
    with os.fdopen(result_to, "w") as out:
        json.dump(main(**json.load(sys.stdin)), out)
