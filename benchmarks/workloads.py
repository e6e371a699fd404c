"""Seeded workloads for a server: random tokens of fixed lengths, as ``vllm bench serve`` makes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of one kind.

    Args:
        input_len: prompt tokens, of which
        prefix_len: are the same for all requests, or, with
        documents: for those that are about the same one of so many.
        output_len: generated tokens.
        request_rate: requests per second that arrive; 0 is all at once.
        burstiness: 1 is a Poisson process, less comes in bursts.
        alone: measured with one request at a time only, whatever concurrencies are asked for.
    """

    name: str
    input_len: int
    output_len: int
    prefix_len: int = 0
    documents: int = 0
    request_rate: float = 0
    burstiness: float = 1
    alone: bool = False

    @property
    def longest(self) -> int:
        """Tokens of one request."""
        return self.input_len + self.output_len

    def num_prompts(self, least: int) -> int:
        """Requests to send: ``least``, or as many more as ask about each document three times."""
        if not self.documents:
            return least
        return self.documents * max(3, -(-least // self.documents))

    def arguments(self) -> list[str]:
        """Options of ``vllm bench serve``."""
        lengths = {
            "prefix-len": self.prefix_len,
            "input-len": self.input_len - self.prefix_len,
            "output-len": self.output_len,
        }
        dataset = "random"
        if self.documents:
            dataset = "prefix_repetition"
            lengths["suffix-len"] = lengths.pop("input-len")
            lengths["num-prefixes"] = self.documents
        option = "--" + dataset.replace("_", "-")
        return [
            *("--dataset-name", dataset),
            *(x for name, n in lengths.items() for x in (f"{option}-{name}", str(n))),
            *("--request-rate", str(self.request_rate or "inf")),
            *("--burstiness", str(self.burstiness)),
        ]


#: Inter-token latency against context, up to what the servers take.
CONTEXTS = tuple(
    Workload(f"context-{n}", n, 32, alone=True) for n in (256, 1024, 2048, 4096, 8192, 32768)
)
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("chat", 128, 64),
        Workload("long", 1536, 32),
        Workload("shared-prefix", 1280, 32, prefix_len=1024),
        # Questions about texts that come back: their cache is used again if there is room for it.
        Workload("documents", 1088, 32, prefix_len=1024, documents=12),
        Workload("burst", 512, 32, request_rate=2, burstiness=0.2),
        *CONTEXTS,
    )
}
