"""One measured run of ``vllm bench serve`` against a running server, from both ends."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import urllib.error
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from .vllm_server import ServerError, VllmServer
from .workloads import Workload

#: Ours to the names in the result of ``vllm bench serve``.
CLIENT = {
    "request_throughput": "request_throughput",
    "output_throughput": "output_throughput",
    **{
        f"{metric}_ms_p{percentile}": f"p{percentile}_{metric}_ms"
        for metric in ("ttft", "itl", "e2el")
        for percentile in (50, 90, 99)
    },
}
SAMPLE_SECONDS = 0.5


class CacheWatch(threading.Thread):
    """Samples a server's cache use until stopped; ``peak`` is the largest share seen."""

    def __init__(self, server: VllmServer):
        super().__init__(daemon=True)
        self.server = server
        self.peak = 0.0
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            try:
                self.peak = max(self.peak, metric(self.server, "vllm:kv_cache_usage_perc"))
            except (urllib.error.URLError, OSError):
                return  # the server died, which the client reports

    def stop(self) -> float:
        """End sampling; the peak."""
        self._stopped.set()
        self.join()
        return self.peak


def metric(server: VllmServer, name: str) -> float:
    """A metric's sum over its labels. A counter's samples have ``_total`` after its name.

    Raises:
        ServerError: the server has no such metric.
    """
    for family in text_string_to_metric_families(server.metrics()):
        if family.name == name:
            wanted = (name, f"{name}_total")
            return sum(sample.value for sample in family.samples if sample.name in wanted)
    raise ServerError(f"{server.url}/metrics: no {name}")


def measure(
    server: VllmServer, workload: Workload, concurrency: int, num_prompts: int, seed: int
) -> dict[str, Any]:
    """Run a workload with at most ``concurrency`` requests at a time; a row of numbers.

    Raises:
        ServerError: the client failed, or not all requests were answered.
    """
    preemptions = metric(server, "vllm:num_preemptions")
    watch = CacheWatch(server)
    watch.start()
    try:
        result = _bench_serve(server, workload, concurrency, num_prompts, seed)
    finally:
        peak = watch.stop()
    return {
        **{ours: result[theirs] for ours, theirs in CLIENT.items()},
        "duration_s": result["duration"],
        "preemptions": int(metric(server, "vllm:num_preemptions") - preemptions),
        "peak_cache_use": peak,
    }


def _bench_serve(
    server: VllmServer, workload: Workload, concurrency: int, num_prompts: int, seed: int
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        command = [
            *(Path(sys.executable).with_name("vllm"), "bench", "serve"),
            *("--backend", "openai", "--base-url", server.url, "--model", server.model),
            *workload.arguments(),
            *("--max-concurrency", concurrency, "--num-prompts", num_prompts, "--seed", seed),
            *("--ignore-eos", "--temperature", 0, "--num-warmups", 2, "--disable-tqdm"),
            *("--percentile-metrics", "ttft,itl,e2el", "--metric-percentiles", "50,90,99"),
            *("--save-result", "--result-dir", directory, "--result-filename", "result.json"),
        ]
        done = subprocess.run(
            [*map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        path = Path(directory) / "result.json"
        if done.returncode or not path.is_file():
            lines = "\n".join(done.stdout.splitlines()[-15:])
            raise ServerError(f"vllm bench serve: status {done.returncode}; last lines:\n{lines}")
        result = json.loads(path.read_text())
    if result["completed"] != num_prompts:
        raise ServerError(
            f"vllm bench serve: expected {num_prompts} answered requests, found "
            f"{result['completed']}; the server's last lines:\n{server.last_lines()}"
        )
    return result
