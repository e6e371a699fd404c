"""Asks vLLM's asynchronous engine in ways that its synchronous one has not.

Reads ``{"engine": {arguments}, "prompts": [[ids]]}`` from stdin; the last line that it prints is
``{what: [tokens of a request, ...], "engines": tokens that each engine generated}``. The engine is
paused after some tokens of a request, which goes on when it is resumed.
"""

import asyncio
import json
import sys


async def main(engine, prompts):
    from prometheus_client import REGISTRY
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.engine.protocol import StreamingInput
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(dtype="float32", enforce_eager=True, **engine)
    llm = AsyncLLM.from_engine_args(arguments)
    sampling = SamplingParams(
        temperature=0, max_tokens=16, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )

    async def answer(prompt, name, pause=None):
        tokens = []
        async for output in llm.generate(prompt, sampling, name):
            tokens += output.outputs[0].token_ids
            if pause is not None and len(tokens) >= 4:
                await llm.pause_generation(mode="keep", clear_cache=pause)
                assert await llm.is_paused()
                await llm.resume_generation()
                pause = None
        return tokens

    async def stream(ids):
        for part in (ids[:20], ids[20:]):
            yield StreamingInput(prompt={"prompt_token_ids": part})

    async def all_at_once(kind, pause=None):
        """Answers to all prompts; the first one pauses the engine for all."""
        pauses = [pause, *(None for _ in prompts[1:])]
        return await asyncio.gather(
            *(
                answer({"prompt_token_ids": ids}, f"{kind} {i}", pause)
                for i, (ids, pause) in enumerate(zip(prompts, pauses, strict=True))
            )
        )

    found = {
        "at once": await all_at_once("at once"),
        "streamed input": [await answer(stream(prompts[-1]), "streamed")],
    }
    # Several engines would have to be paused one by one.
    if engine.get("data_parallel_size", 1) == 1:
        found["paused"] = await all_at_once("paused", pause=False)
        found["paused and cleared"] = await all_at_once("cleared", pause=True)
    found["engines"] = [
        sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "vllm:generation_tokens_total"
    ]
    llm.shutdown()
    return found


if __name__ == "__main__":
    job = json.load(sys.stdin)
    print("\n" + json.dumps(asyncio.run(main(**job))), flush=True)
