"""A real server under mixed load: ragged, shared, abandoned, oversize and malformed requests.

``python -m tests.reliability.soak MODEL --seconds 900`` prints what happened as JSON. The load is
bounded by time and by number of requests. Between, a fixed set of greedy probes is compared with
the answers of the quiet server. A stock model is soaked likewise, to compare with.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import aiohttp
import psutil

from recalkv_vllm.benchmarks.load import metric
from recalkv_vllm.benchmarks.vllm_server import VllmServer
from tests.reliability.hostile import MALFORMED, RAW

MAX_MODEL_LEN = 512
BLOCK_SIZE = 32
#: Room for two requests of the longest length: more preempt one another.
BLOCKS = 2 * MAX_MODEL_LEN // BLOCK_SIZE + 1
SERVER = [
    *("--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", str(MAX_MODEL_LEN), "--block-size", str(BLOCK_SIZE)),
    *("--num-gpu-blocks-override", str(BLOCKS), "--kv-cache-memory-bytes", str(256 << 20)),
    *("--max-num-seqs", "16", "--max-num-batched-tokens", "256"),
]
#: oneDNN keeps the products of the last 1,024 shapes that it compiled, over 100 MB of them, which
#: would hide a leak of that size.
ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
CLIENTS = 12
#: Most requests per second, over all clients, where no number is given.
RATE = 40
#: A request that takes longer is a hang.
TIMEOUT_SECONDS = 300
PROBES = 8
PROBE_TOKENS = 24
#: Lines of a server's log that something went wrong.
COMPLAINT = re.compile(r"\b(ERROR|CRITICAL)\b|Traceback")


@dataclass
class Report:
    """What a soak did and what came of it."""

    seconds: float = 0
    requests: int = 0
    served: int = 0
    refused: int = 0
    aborted: int = 0
    probes: int = 0
    wrong_answers: int = 0
    preemptions: int = 0
    prefix_cache_hits: int = 0
    leaked_blocks: float = 0
    rss_mb: float = 0
    rss_growth_mb: float = 0
    unexpected: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


class Load:
    """Clients of one server; ``draw`` decides what each does next."""

    def __init__(self, server: VllmServer, session: aiohttp.ClientSession, seed: int):
        self.server = server
        self.session = session
        self.draw = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.unexpected: list[str] = []
        draw = random.Random(0)
        self.vocabulary = 480
        self.prefixes = [self.tokens(draw, n) for n in (64, 100, 200, 300)]
        self.probe_prompts = [self.tokens(draw, n) for n in (1, 5, 31, 32, 33, 90, 180, 250)]
        self.answers: list[Any] = []

    def tokens(self, draw: random.Random, count: int) -> list[int]:
        """A random prompt of token ids that any of the models has."""
        return [draw.randrange(3, self.vocabulary) for _ in range(count)]

    def body(self, prompt: list[int], max_tokens: int, **options: Any) -> dict[str, Any]:
        """A completion request of a legal size."""
        return {
            "model": self.server.model,
            "prompt": prompt[: MAX_MODEL_LEN - max_tokens],
            "max_tokens": max_tokens,
            **options,
        }

    def random_body(self, **options: Any) -> dict[str, Any]:
        """Ragged in length, often with a prefix that others have too."""
        draw = self.draw
        prompt = self.tokens(draw, int(400 ** draw.random()))
        if draw.random() < 0.5:
            prompt = draw.choice(self.prefixes)[: draw.choice((32, 64, 500))] + prompt
        sampling = draw.choice(({"temperature": 0}, {"temperature": 0.7}, {"top_k": 9, "n": 2}))
        return self.body(prompt, draw.randint(1, 64), ignore_eos=True, **sampling, **options)

    async def post(self, body: Any) -> tuple[int, Any]:
        """Status and JSON of a completion."""
        url = f"{self.server.url}/v1/completions"
        async with self.session.post(url, json=body) as answer:
            return answer.status, await answer.json(content_type=None)

    def expect(self, right: bool, what: str) -> None:
        if not right:
            self.unexpected.append(what[:300])

    async def complete(self) -> None:
        status, answer = await self.post(self.random_body())
        self.expect(status == 200, f"a legal request: {status} {answer}")
        self.counts["served"] += 1

    async def stream(self, chunks: int | None = None) -> None:
        """Read a stream to its end, or go away after some chunks."""
        url, body = f"{self.server.url}/v1/completions", self.random_body(stream=True)
        async with self.session.post(url, json=body) as answer:
            self.expect(answer.status == 200, f"a legal stream: {answer.status}")
            async for line in answer.content:
                if chunks is not None and line.startswith(b"data:"):
                    chunks -= 1
                    if chunks < 0:
                        answer.close()
                        self.counts["aborted"] += 1
                        return
            self.expect(line == b"\n", f"a stream's end: {line!r}")
        self.counts["served"] += 1

    async def vanish(self) -> None:
        await self.stream(self.draw.randrange(6))

    async def abort(self) -> None:
        """Give up on an answer that is still being made, or was not begun."""
        try:
            await asyncio.wait_for(self.complete(), self.draw.random())
        except asyncio.TimeoutError:
            self.counts["aborted"] += 1

    async def oversize(self) -> None:
        if self.draw.random() < 0.5:
            sizes = (MAX_MODEL_LEN + 1, 5_000, 50_000)
            await self.refused({"prompt": self.tokens(self.draw, self.draw.choice(sizes))})
        else:
            sizes = (MAX_MODEL_LEN + 1, 10**6, 2**31)
            await self.refused({"max_tokens": self.draw.choice(sizes)})

    async def malformed(self) -> None:
        await self.refused(self.draw.choice(MALFORMED))

    async def refused(self, change: dict[str, Any]) -> None:
        """A legal request with a change that spoils it."""
        body = {**self.random_body(), **change}
        status, answer = await self.post(body)
        self.expect(400 <= status < 500, f"a bad request: {status} {str(answer)[:100]} to {change}")
        self.counts["refused"] += 1

    async def raw(self) -> None:
        """Bytes that are no request, or half of one, and a hung-up connection."""
        await self.send(self.draw.choice(RAW))

    async def send(self, data: bytes) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        writer.write(data)
        await writer.drain()
        if self.draw.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()
        self.counts["aborted"] += 1

    async def ask(self, probe: int) -> Any:
        body = self.body(self.probe_prompts[probe], PROBE_TOKENS, temperature=0, ignore_eos=True,
                         return_token_ids=True)  # fmt: skip
        status, answer = await self.post(body)
        return answer["choices"][0]["token_ids"] if status == 200 else f"{status}: {answer}"

    async def probe(self) -> None:
        probe = self.draw.randrange(PROBES)
        answer = await self.ask(probe)
        self.counts["probes"] += 1
        self.counts["served"] += 1
        if answer != self.answers[probe]:
            self.counts["wrong answers"] += 1
            self.expect(False, f"probe {probe}: {answer} instead of {self.answers[probe]}")

    async def everything_once(self) -> None:
        """So that no library is first loaded when memory is watched."""
        for change in MALFORMED:
            await self.refused(change)
        for data in RAW:
            await self.send(data)
        await self.refused({"prompt": self.tokens(self.draw, 50_000)})

    async def run(self, seconds: float, requests: float) -> None:
        """All clients, until the time or the number of requests is used up."""
        deadline = time.monotonic() + seconds
        left = requests
        behaviours: dict[Callable[[], Awaitable[None]], int] = {
            self.complete: 6, self.stream: 4, self.probe: 4, self.vanish: 3, self.abort: 3,
            self.oversize: 1, self.malformed: 2, self.raw: 1,
        }  # fmt: skip

        async def client() -> None:
            nonlocal left
            while time.monotonic() < deadline and left > 0:
                left -= 1
                (behaviour,) = self.draw.choices([*behaviours], [*behaviours.values()])
                self.counts["requests"] += 1
                try:
                    await behaviour()
                except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                    self.expect(False, f"{behaviour.__name__}: {type(error).__name__} {error}")

        await asyncio.gather(*(client() for _ in range(CLIENTS)))


async def settle(server: VllmServer) -> None:
    """Wait until no request runs or waits. Raises :class:`TimeoutError` after a minute."""
    deadline = time.monotonic() + 60
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    while sum([await asyncio.to_thread(metric, server, name) for name in names]):
        if time.monotonic() > deadline:
            raise TimeoutError("requests are left a minute after the last client")
        await asyncio.sleep(0.2)


def resident_mb(server: VllmServer) -> float:
    """Memory of the server and all its processes, in MB."""
    root = psutil.Process(server.process.pid)
    return sum(p.memory_info().rss for p in (root, *root.children(recursive=True))) / 1e6


async def soak(server: VllmServer, seconds: float, requests: int, seed: int = 0) -> Report:
    """Load a running server; a quarter of it is warm-up, after which memory is to be flat."""
    started = time.monotonic()
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        load = Load(server, session, seed)
        load.answers = [await load.ask(probe) for probe in range(PROBES)]
        again = [await load.ask(probe) for probe in range(PROBES)]
        load.expect(load.answers == again, "the quiet server answers differently from itself")
        load.expect(not any(isinstance(answer, str) for answer in again), f"quiet: {again}")
        await load.everything_once()
        await load.run(seconds / 4, requests / 4)
        await settle(server)
        before = resident_mb(server)
        await load.run(seconds * 3 / 4, requests * 3 / 4)
        await settle(server)
        after = resident_mb(server)
        for probe in range(PROBES):
            load.expect(await load.ask(probe) == load.answers[probe], f"probe {probe} at the end")
    await settle(server)
    usage = metric(server, "vllm:kv_cache_usage_perc")
    lines = server.log.read_text(errors="replace").splitlines()
    return Report(
        seconds=time.monotonic() - started,
        requests=load.counts["requests"],
        served=load.counts["served"],
        refused=load.counts["refused"],
        aborted=load.counts["aborted"],
        probes=load.counts["probes"],
        wrong_answers=load.counts["wrong answers"],
        preemptions=int(metric(server, "vllm:num_preemptions")),
        prefix_cache_hits=int(metric(server, "vllm:prefix_cache_hits")),
        leaked_blocks=round(usage * (BLOCKS - 1), 3),
        rss_mb=round(after, 1),
        rss_growth_mb=round(after - before, 1),
        unexpected=load.unexpected,
        complaints=[line for line in lines if COMPLAINT.search(line)],
    )


def run(
    model: Path, seconds: float, log: Path, requests: int | None = None, seed: int = 0
) -> Report:
    """Serve ``model``, soak it for ``seconds`` or so many requests, stop it."""
    requests = int(seconds * RATE) if requests is None else requests
    with mock.patch.dict(os.environ, ENVIRONMENT), VllmServer(model, SERVER, log) as server:
        return asyncio.run(soak(server, seconds, requests, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        report = run(options.model, options.seconds, Path(directory) / "log", seed=options.seed)
    print(json.dumps(asdict(report), indent=2))


if __name__ == "__main__":
    main()
