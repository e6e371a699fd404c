"""A ``vllm serve`` process: started, waited for, read and stopped."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

_CACHE_SIZE = re.compile(r"KV cache size: ([\d,]+) tokens")


class ServerError(RuntimeError):
    """A server that did not come up; the message ends with its last log lines."""


def free_port() -> int:
    """A TCP port on the loopback interface that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class VllmServer:
    """Context manager around ``vllm serve MODEL ARGS``; its log goes to ``log``.

    Raises:
        ServerError: on entering, when the process ends or does not answer in ``timeout`` seconds.
    """

    def __init__(self, model: str | Path, args: Sequence[str], log: Path, timeout: float = 300):
        self.model = str(model)
        self.args = list(args)
        self.log = log
        self.timeout = timeout
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> VllmServer:
        vllm = Path(sys.executable).with_name("vllm")
        command = [vllm, "serve", self.model, "--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *self.args],
                stdout=log,
                stderr=subprocess.STDOUT,
                # A group of its own, so that stopping it reaches the engine processes as well.
                start_new_session=True,
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(
                    f"vllm serve {self.model}: ended with status {self.process.returncode} "
                    f"before it was ready; its last lines:\n{self.last_lines()}"
                )
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        raise ServerError(
            f"vllm serve {self.model}: not ready after {self.timeout:.0f} s; "
            f"its last lines:\n{self.last_lines()}"
        )

    def last_lines(self, count: int = 15) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])

    def kv_cache_tokens(self) -> int:
        """vLLM's own "KV cache size: N tokens".

        Raises:
            ServerError: when the log has no such line.
        """
        found = _CACHE_SIZE.search(self.log.read_text(errors="replace"))
        if found is None:
            raise ServerError(f"{self.log}: no line with 'KV cache size: N tokens'")
        return int(found.group(1).replace(",", ""))

    def metrics(self) -> str:
        """The Prometheus text of ``/metrics``."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            return answer.read().decode()

    def stop(self) -> None:
        """Ask the server to end, then end whatever is left of its process group."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
