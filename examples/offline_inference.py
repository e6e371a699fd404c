"""Answer questions without a server: ``python examples/offline_inference.py CHECKPOINT``."""

import sys

from vllm import LLM, SamplingParams

QUESTIONS = ["What is photosynthesis?", "Write a Python function that adds two numbers."]


def main(checkpoint: str) -> None:
    llm = LLM(
        model=checkpoint,
        attention_backend="recalkv",  # Not needed, but refuses a model that is not compressed.
        max_model_len=2048,
        kv_cache_memory_bytes=256 << 20,  # Without it, a GPU server takes what memory is left.
        enforce_eager=True,  # Starts sooner. On a GPU, leave it out.
    )
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    for question, answer in zip(
        QUESTIONS, llm.chat(chats, SamplingParams(temperature=0, max_tokens=48)), strict=True
    ):
        print(f"{question}\n{answer.outputs[0].text.strip()}\n")


# The engine is a process of its own, which imports this file again.
if __name__ == "__main__":
    main(sys.argv[1])
