"""A server that is killed, told to end, or given too little memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil
import pytest
from vllm.engine.arg_utils import EngineArgs

from recalkv_vllm.benchmarks.vllm_server import VllmServer
from recalkv_vllm.serving.startup.errors import ServingError
from tests.e2e.conftest import BIN
from tests.reliability.figures import count
from tests.reliability.soak import SERVER

TOKENS = 400


@pytest.fixture(scope="module")
def model(small: Path, compressed) -> Path:
    return compressed(small, compression=0.5)


@pytest.fixture
def server(model: Path, tmp_path: Path) -> VllmServer:
    """Not started yet; it may be started again."""
    return VllmServer(model, [*SERVER, "--shutdown-timeout", "60"], tmp_path / "log")


def processes(server: VllmServer) -> list[psutil.Process]:
    """What runs in the server's session."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                os.getsid(process.pid) == server.process.pid
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def wait_until_gone(server: VllmServer, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while (left := processes(server)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, f"left {seconds} s after the server: {left}"


def open_stream(server: VllmServer, max_tokens: int = TOKENS) -> Any:
    """A stream of a completion, of which the first line was read."""
    body = {"model": server.model, "prompt": [5, 6, 7], "max_tokens": max_tokens,
            "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    stream = urllib.request.urlopen(request, timeout=120)
    assert stream.readline().startswith(b"data:")
    return stream


def tokens(lines: Iterator[bytes]) -> int:
    """How many the rest of a stream, which ends as it should, says that it had."""
    *_, last, done = [line for line in lines if line.startswith(b"data: ")]
    assert done == b"data: [DONE]\n"
    return json.loads(last.removeprefix(b"data: "))["usage"]["completion_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["API server", "engine"])
def test_killed_while_serving(server: VllmServer, victim: str) -> None:
    """The same command serves again, on the same port.

    vLLM's engine outlives a killed API server, and an API server whose engine was killed ends with
    status 0; so only the process group, which ends with the first server here, can be asked for.
    """
    with server:
        stream = open_stream(server)
        engine = next(p for p in processes(server) if "EngineCore" in " ".join(p.cmdline()))
        killed = server.process.pid if victim == "API server" else engine.pid
        os.kill(killed, signal.SIGKILL)
        count("faults injected")
        # Cut off, or ended with an error instead of a usage.
        with pytest.raises((OSError, HTTPException, AssertionError, ValueError, KeyError)):
            tokens(stream)
        server.process.wait(timeout=60)
    wait_until_gone(server)
    with server:
        assert tokens(open_stream(server, 20)) == 20


@pytest.mark.slow
def test_sigterm_drains(server: VllmServer) -> None:
    """A request that runs is answered to its end, with ``--shutdown-timeout``; then all end.

    The log is not looked at: vLLM 0.32's API server may miss its engine, and say so, before it
    ends itself.
    """
    with server:
        stream = open_stream(server)
        counted: list[int] = []
        reader = threading.Thread(target=lambda: counted.append(tokens(stream)))
        reader.start()
        server.process.send_signal(signal.SIGTERM)
        count("faults injected")
        reader.join(timeout=120)
        assert counted == [TOKENS]
        assert server.process.wait(timeout=60) == 0
        wait_until_gone(server)


@pytest.mark.slow
def test_sigterm_during_startup(server: VllmServer) -> None:
    """Nothing is left. While it imports: vLLM 0.32, stock too, may wait for ever for its engine's
    process if it is told to end while that one starts."""
    started = threading.Timer(4, lambda: server.process.send_signal(signal.SIGTERM))
    started.start()
    with pytest.raises(RuntimeError), server:
        pytest.fail("became ready")
    count("faults injected")
    wait_until_gone(server)


def create(model: Path, **arguments: Any) -> None:
    arguments = {"enforce_eager": True, "dtype": "float32", "block_size": 32, **arguments}
    EngineArgs(model=str(model), **arguments).create_engine_config()


def test_cache_too_small_for_one_request(model: Path) -> None:
    """Refused with what would do, and with the command that plans for it."""
    with pytest.raises(ServingError) as caught:
        create(model, kv_cache_memory_bytes=100_000, max_model_len=512)
    count("faults injected")
    message = str(caught.value)
    needed = int(message.split("expected ")[1].split()[0])
    assert f"recalkv plan {model} --max-model-len 512 --block-size 32" in message
    assert "--kv-cache-memory-bytes 100000" in message
    assert "\n" not in message
    command = message.split("told by: ")[1].split()
    planned = subprocess.run([BIN / command[0], *command[1:], "--json"], capture_output=True)
    assert json.loads(planned.stdout)["max_concurrency"]["compressed"] < 1
    create(model, kv_cache_memory_bytes=needed, max_model_len=512)
    with pytest.raises(ServingError):
        create(model, kv_cache_memory_bytes=needed - 1, max_model_len=512)
    # vLLM looks for the length that fits.
    create(model, kv_cache_memory_bytes=100_000, max_model_len=-1)


@pytest.mark.slow
def test_what_is_needed_is_what_vllm_needs(model: Path, tmp_path: Path) -> None:
    """The least that passes our check passes vLLM's: the sizes are the same."""
    with pytest.raises(ServingError) as caught:
        create(model, kv_cache_memory_bytes=1, max_model_len=512)
    needed = str(caught.value).split("expected ")[1].split()[0]
    args = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    args += ["--block-size", "32", "--kv-cache-memory-bytes", needed]
    with VllmServer(model, args, tmp_path / "log") as server:
        assert tokens(open_stream(server)) == TOKENS
