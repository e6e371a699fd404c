"""Broken checkpoints: every mutant is read as what it says, or refused with our own error."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recalkv_vllm.checkpoint import (
    AttentionGeometry,
    CheckpointError,
    FactorReader,
    LatentLayout,
    RecalkvConfig,
    factor_name,
    file_sha256,
    save_factors,
)
from recalkv_vllm.latent_format import LatentFormat
from tests.reliability.figures import count

MUTANTS = 5_000  # of configurations, and of files
LAYOUT = LatentLayout(64, 2, ((0, 16), (16, 32)), ((32, 64),), (2, 0, 3, 1))
CONFIG = RecalkvConfig("test", 0.5, (LAYOUT, LAYOUT), latent_quantization=LatentFormat("int4", 32))
HF_CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
GEOMETRY = AttentionGeometry.from_hf_config(HF_CONFIG)
#: What a broken tool or a hostile hand may put anywhere.
STRANGE = (None, True, -1, 0, 1, 3, 16, 2**31, 2**63, 10**400, -0.0, 1e308, float("nan"),
           float("inf"), "", "int4", "16", "../../etc/passwd", [], [[]], [0, 16], [[0, 16]], {},
           {"dtype": "int4"}, [None] * 3, "\x00", "ü" * 50)  # fmt: skip


def outcome(config: Any, path: Path) -> tuple[RecalkvConfig, dict[str, torch.Tensor]] | str:
    """Everything that is read, or the refusal. Any other exception fails the test."""
    try:
        recalkv = RecalkvConfig.from_hf_config(config)
        geometry = AttentionGeometry.from_hf_config(config)
        tensors = {}
        with FactorReader(path, recalkv, geometry) as reader:
            reader.check()
            for i, layer in enumerate(recalkv.layers):
                for short in layer.factor_shapes(geometry):
                    tensors[factor_name(i, short)] = reader.read(i, short)
    except CheckpointError as error:
        message = str(error)
        assert message
        assert "\n" not in message
        return message
    return recalkv, tensors


@pytest.fixture
def factors(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "recalkv.safetensors"
    tensors = {
        factor_name(i, short): torch.randn(*shape, generator=generator)
        for i, layer in enumerate(CONFIG.layers)
        for short, shape in layer.factor_shapes(GEOMETRY).items()
    }
    save_factors(path, tensors)
    return path


def mutate(value: Any, draw: random.Random) -> Any:
    """One change somewhere in a JSON value: replaced, dropped, doubled, or a neighbour added."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value, key=str))
        changed = dict(value)
        match draw.randrange(8):
            case 0:
                del changed[key]
            case 1:
                changed[draw.choice(("extra", key + "_", "", "__class__"))] = draw.choice(STRANGE)
            case _:
                changed[key] = mutate(value[key], draw)
        return changed
    if isinstance(value, list) and value and draw.random() < 0.8:
        index = draw.randrange(len(value))
        match draw.randrange(6):
            case 0:
                return value[:index] + value[index + 1 :]
            case 1:
                return [*value[:index], value[index], *value[index:]]
            case _:
                return [*value[:index], mutate(value[index], draw), *value[index + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.6:
        return value + draw.choice((-16, -1, 1, 16, 10**9))
    return draw.choice(STRANGE)


def test_configurations(factors: Path) -> None:
    """A mutant that is accepted says what it was given, and reads factors of those shapes."""
    draw = random.Random(1)
    whole = {**HF_CONFIG, "recalkv": CONFIG.to_dict()}
    before = outcome(whole, factors)
    assert not isinstance(before, str)
    counts: Counter[str] = Counter()
    for _ in range(MUTANTS):
        # The reader of config.json sees to it that it is an object.
        key = "recalkv" if draw.random() < 0.8 else draw.choice(list(HF_CONFIG))
        mutant = {**whole, key: mutate(copy.deepcopy(whole[key]), draw)}
        result = outcome(mutant, factors)
        counts["refused" if isinstance(result, str) else "read"] += 1
        if not isinstance(result, str):
            config, tensors = result
            assert config.to_dict() == json.loads(json.dumps(mutant["recalkv"]))
            assert tensors.keys() == before[1].keys()
            assert all(torch.equal(tensors[name], before[1][name]) for name in tensors)
    show(counts)
    assert counts["refused"] > MUTANTS / 2
    assert counts["read"] > 10


def show(counts: Counter[str]) -> None:
    """Add to the figures of this run."""
    count("mutants tried", counts.total())
    count("mutants refused", counts["refused"])
    count("mutants loaded, to what they say", counts["read"])


def broken_file(content: bytes, draw: random.Random) -> bytes:
    """Cut, flip, extend, spoil numbers, or rewrite the header of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = content[8 : 8 + length], content[8 + length :]
    match draw.randrange(6):
        case 0:
            return content[: draw.randrange(len(content))]
        case 1:
            position = draw.randrange(8 + length)
            flipped = content[position] ^ (1 << draw.randrange(8))
            return content[:position] + bytes([flipped]) + content[position + 1 :]
        case 2:
            declared = draw.choice((0, 1, length - 1, length + 1, len(content), 2**40, 2**64 - 1))
            return struct.pack("<Q", declared) + header + body
        case 3:
            return content + bytes(draw.randrange(1, 100))
        case 4:
            value = draw.choice((torch.nan, torch.inf, -torch.inf))
            numbers = torch.frombuffer(bytearray(body), dtype=torch.float32)
            numbers[draw.randrange(len(numbers))] = value
            return content[: 8 + length] + numbers.numpy().tobytes()
        case _:
            text = json.dumps(mutate(json.loads(header), draw)).encode()
            return struct.pack("<Q", len(text)) + text + body


def flipped_number(content: bytes, draw: random.Random) -> bytes:
    """One bit of the body, which leaves the file well-formed."""
    (length,) = struct.unpack("<Q", content[:8])
    position = draw.randrange(8 + length, len(content))
    flipped = content[position] ^ (1 << draw.randrange(8))
    return content[:position] + bytes([flipped]) + content[position + 1 :]


def test_files(factors: Path, tmp_path: Path) -> None:
    """A file that is accepted holds the very tensors of the whole one."""
    draw = random.Random(2)
    config = {**HF_CONFIG, "recalkv": CONFIG.to_dict()}
    before = outcome(config, factors)
    assert not isinstance(before, str)
    content = factors.read_bytes()
    path = tmp_path / "mutant.safetensors"
    counts: Counter[str] = Counter()
    for _ in range(MUTANTS // 2):
        path.write_bytes(broken_file(content, draw))
        result = outcome(config, path)
        counts["refused" if isinstance(result, str) else "read"] += 1
        if not isinstance(result, str):
            assert result[1].keys() == before[1].keys()
            assert all(torch.equal(result[1][name], before[1][name]) for name in before[1])
    show(counts)
    assert counts["refused"] > MUTANTS / 4


def test_files_with_a_digest(factors: Path, tmp_path: Path) -> None:
    """Any change is refused where the configuration records a digest, one bit's included."""
    draw = random.Random(3)
    recorded = replace(CONFIG, factors_sha256=file_sha256(factors))
    config = {**HF_CONFIG, "recalkv": recorded.to_dict()}
    assert not isinstance(outcome(config, factors), str)
    content = factors.read_bytes()
    path = tmp_path / "mutant.safetensors"
    counts: Counter[str] = Counter()
    for _ in range(MUTANTS // 2):
        change = draw.choice((broken_file, flipped_number))
        mutant = change(content, draw)
        path.write_bytes(mutant)
        result = outcome(config, path)
        counts["refused" if isinstance(result, str) else "read"] += 1
        assert isinstance(result, str) or mutant == content
    show(counts)
    assert counts["refused"] > MUTANTS / 4


@pytest.mark.parametrize("name", ["directory", "missing", "empty", "pickle"])
def test_not_a_file_of_factors(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "directory":
        path.mkdir()
    elif name == "empty":
        path.touch()
    elif name == "pickle":
        torch.save({"layers.0.down": torch.zeros(64, 48)}, path)
    message = outcome({**HF_CONFIG, "recalkv": CONFIG.to_dict()}, path)
    assert isinstance(message, str)
    assert str(path) in message
