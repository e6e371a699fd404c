"""Requests that no server should answer, nor end from."""

from __future__ import annotations

from typing import Any

#: Fields that spoil a completion request; each is refused with a 4xx status.
MALFORMED: tuple[dict[str, Any], ...] = (
    {"model": "another-model"},
    {"prompt": None},
    {"prompt": {"text": "x"}},
    {"prompt": [-1, 5]},
    {"prompt": [10**12]},
    {"prompt": [1.5]},
    {"max_tokens": -1},
    {"max_tokens": "many"},
    {"temperature": -1},
    {"temperature": "hot"},
    {"top_p": 7},
    {"top_k": -5},
    {"n": 0},
    {"n": -3},
    {"logprobs": 10**9},
    {"stop": [1, 2]},
    {"logit_bias": {"word": 1}},
    {"presence_penalty": 99},
    {"min_tokens": 10**6},
    {"stream": "perhaps"},
    {"stream_options": {"include_usage": True}, "stream": False},
    {"structured_outputs": {"json": {"type": "no such type"}}},
)

#: What may come over a socket before it is closed.
RAW: tuple[bytes, ...] = (
    b"",
    b"\x00" * 1000,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the start of a TLS handshake
    b"GET",
    b"BREW /v1/completions HTTP/1.1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: 2\r\n\r\n[[",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
)
