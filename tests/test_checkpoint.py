"""The strict reader: what it accepts comes back unchanged, what is off is named in one line."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from recalkv_vllm.checkpoint import (
    FACTORS_FILE,
    AttentionGeometry,
    CheckpointError,
    FactorReader,
    LatentLayout,
    RecalkvConfig,
    compression_reached,
    factor_name,
    file_sha256,
    kv_bytes_per_token,
    rank_budget,
    read_hf_config,
    save_factors,
)
from recalkv_vllm.latent_format import LatentFormat

HF_CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
GEOMETRY = AttentionGeometry.from_hf_config(HF_CONFIG)
DISJOINT = LatentLayout(64, 2, ((0, 16), (16, 32)), ((32, 64),), (2, 0, 3, 1))
JOINT = LatentLayout(48, 4, ((0, 32),), ((0, 48),), (0, 1, 2, 3))
CONFIG = RecalkvConfig("recalkv", 0.5, (DISJOINT, JOINT))


def hf_config(config=CONFIG):
    return {**HF_CONFIG, "recalkv": config.to_dict()}


def factors(config=CONFIG):
    torch.manual_seed(0)
    return {
        factor_name(i, short): torch.randn(shape)
        for i, layout in enumerate(config.layers)
        for short, shape in layout.factor_shapes(GEOMETRY).items()
    }


@pytest.fixture
def factors_file(tmp_path):
    save_factors(tmp_path / FACTORS_FILE, factors())
    return tmp_path / FACTORS_FILE


def test_config_round_trip():
    assert RecalkvConfig.from_hf_config(json.loads(json.dumps(hf_config()))) == CONFIG


def test_factors_round_trip(factors_file):
    expected = factors()
    with FactorReader(factors_file, CONFIG, GEOMETRY) as reader:
        assert reader.dtype == torch.float32
        for i in range(2):
            for short in ("down", "k_up", "v_up"):
                torch.testing.assert_close(
                    reader.read(i, short), expected[factor_name(i, short)], rtol=0, atol=0
                )


def test_sizes():
    assert kv_bytes_per_token(CONFIG, GEOMETRY, 2) == {
        "dense": 2 * 2 * 4 * 16 * 2,
        "compressed": (64 + 48) * 2,
    }
    assert compression_reached(CONFIG, GEOMETRY) == pytest.approx(1 - 112 / 256)
    assert DISJOINT.reconstruct_flop(GEOMETRY) == 2 * 16 * 64
    quantized = replace(CONFIG, latent_quantization=LatentFormat("int4", 32))
    assert kv_bytes_per_token(quantized, GEOMETRY, 4) == {
        "dense": 2 * 2 * 4 * 16 * 4,
        "compressed": (32 + 2 * 2) + (24 + 2 * 2),
    }
    assert compression_reached(quantized, GEOMETRY) == pytest.approx(1 - 64 / 512)


def test_quantized_config_is_read_back():
    config = replace(CONFIG, latent_quantization=LatentFormat("int3", 0))
    assert RecalkvConfig.from_hf_config(json.loads(json.dumps(hf_config(config)))) == config


@given(st.integers(0, 999), st.integers(1, 80), st.integers(1, 16), st.sampled_from([64, 80, 128]))
def test_rank_budget_never_exceeds_what_is_asked(thousandths, layers, heads, head_dim):
    geometry = AttentionGeometry(layers, 512, heads, heads, head_dim)
    dense = geometry.dense_width * layers
    budget = rank_budget(thousandths / 1000, geometry)
    kept = (1000 - thousandths) * dense
    assert budget % 16 == 0
    assert budget * 1000 <= kept < (budget + 16) * 1000


BANDED_LAYER = LatentLayout(
    64, 2, ((0, 32), (32, 64)), ((0, 32), (32, 64)), (0, 1, 2, 3), ((32, 6), (32, 6))
)
BANDED = RecalkvConfig("kfac", 0.7, (BANDED_LAYER, BANDED_LAYER))


def with_recalkv(config=CONFIG, **changes):
    raw = hf_config(config)
    return {**raw, "recalkv": {**raw["recalkv"], **changes}}


def with_bands(bands):
    layers = hf_config(BANDED)["recalkv"]["layers"]
    return with_recalkv(BANDED, layers=[{**layers[0], "bands": bands}, layers[1]])


def test_bands_are_read_back():
    raw = json.loads(json.dumps(hf_config(BANDED)))
    assert raw["recalkv"]["format_version"] == 2
    assert raw["recalkv"]["layers"][0]["bands"] == [[32, 6], [32, 6]]
    assert RecalkvConfig.from_hf_config(raw) == BANDED
    assert kv_bytes_per_token(BANDED, GEOMETRY, 2)["compressed"] == 2 * (48 + 2)
    assert "bands" not in hf_config()["recalkv"]["layers"][0]
    assert hf_config()["recalkv"]["format_version"] == 1


def with_layer(**changes):
    return hf_config(replace(CONFIG, layers=(replace(DISJOINT, **changes), JOINT)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (HF_CONFIG, "recalkv: expected an object, found None"),
        (with_recalkv(format_version=3), "format_version: expected 1 or 2, found 3"),
        (with_recalkv(format_version=2), r"layers\[0\].bands: expected some in format_version 2"),
        (
            with_recalkv(BANDED, format_version=1),
            r"layers\[0\].bands: expected none in format_version 1, found",
        ),
        (
            with_recalkv(BANDED, latent_quantization={"dtype": "int4", "group_size": 32}),
            "latent_quantization: expected null in format_version 2",
        ),
        (with_bands([]), r"bands: expected a list of \[columns, bits\], found \[\]"),
        (with_bands([[64]]), r"bands: expected a list of \[columns, bits\], found"),
        (with_bands([[48, 4], [16, 4]]), "bands: expected positive multiples of 32 columns"),
        (with_bands([[32, 5], [32, 4]]), "bands: expected 2, 3, 4, 6, 8 bits, found 5"),
        (with_bands([[32, 4]]), "bands: expected edges at both ends of the span"),
        (with_bands([[64, 4]]), r"bands: expected edges at both ends of the span \[0, 32\)"),
        (with_bands([[32, 8], [32, 4], [32, 2]]), "bands: expected 64 columns, as rank, found 96"),
        (with_bands([[32, 8], [32, 4]]), "bands: expected the same in all k_spans"),
        (
            hf_config(replace(CONFIG, compression=1.0)),
            r"compression: expected a number in \[0, 1\)",
        ),
        (hf_config(replace(CONFIG, layers=(DISJOINT,))), "layers: expected 2 entries, found 1"),
        (
            hf_config(replace(CONFIG, latent_quantization={"bits": 4})),
            r"latent_quantization: expected dtype and group_size, found {'bits': 4}",
        ),
        (with_layer(rank=60), r"layers\[0\].rank: expected a positive multiple of 16, found 60"),
        (with_layer(k_group_size=3), "k_group_size: expected a divisor of 4 KV heads, found 3"),
        (with_layer(k_spans=((0, 32),)), "k_spans: expected 2 spans"),
        (with_layer(k_spans=((0, 16), (16, 48))), r"spans of one width \(16\), found 32"),
        (with_layer(k_spans=((0, 16), (8, 24))), r"found \[8, 24\]"),
        (with_layer(v_spans=((32, 80),)), r"inside \[0, 64\]"),
        (with_layer(v_spans=((0, 16),) * 3), "v_spans: expected a number of spans that divides 4"),
        (with_layer(head_order=(0, 1, 2, 2)), r"permutation of 0..3, found \[0, 1, 2, 2\]"),
        ({**hf_config(), "num_key_value_heads": 2}, r"layers\[0\].k_spans: expected 1 spans"),
    ],
)
def test_bad_config_is_named(config, message):
    with pytest.raises(CheckpointError, match=message):
        RecalkvConfig.from_hf_config(config)


def test_unknown_and_missing_fields_are_named():
    raw = hf_config()
    raw["recalkv"]["colour"] = "red"
    with pytest.raises(CheckpointError, match="recalkv: unknown colour"):
        RecalkvConfig.from_hf_config(raw)
    raw = hf_config()
    del raw["recalkv"]["layers"][1]["rank"]
    with pytest.raises(CheckpointError, match=r"layers\[1\]: rank missing"):
        RecalkvConfig.from_hf_config(raw)
    raw = hf_config()
    raw["recalkv"]["layers"][1]["rank"] = "48"
    with pytest.raises(CheckpointError, match=r"layers\[1\].rank: expected an integer, found '48'"):
        RecalkvConfig.from_hf_config(raw)


def open_reader(path):
    with FactorReader(path, CONFIG, GEOMETRY) as reader:
        return [
            reader.read(i, short)
            for i, layout in enumerate(CONFIG.layers)
            for short in layout.factor_shapes(GEOMETRY)
        ]


@pytest.mark.parametrize("kept", [0, 4, 100, -8])
def test_truncated_file_is_named(factors_file, kept):
    factors_file.write_bytes(factors_file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"{FACTORS_FILE}: not a readable safetensors file"):
        open_reader(factors_file)


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.k_up"), "tensor layers.1.k_up missing"),
        (lambda t: t.update(extra=torch.ones(1)), "unknown tensor extra"),
        (
            lambda t: t.update({"layers.0.down": torch.ones(64, 32)}),
            r"layers.0.down: expected shape \[64, 64\], found \[64, 32\]",
        ),
        (
            lambda t: t.update({"layers.0.down": torch.ones(64, 64, dtype=torch.int8)}),
            "layers.0.down: expected dtype F32 or BF16 or F16, found I8",
        ),
        (
            lambda t: t.update({"layers.0.down": t["layers.0.down"].half()}),
            r"expected one dtype, found \['F16', 'F32'\]",
        ),
        (
            lambda t: t["layers.1.v_up"][0, 0, :3].fill_(torch.nan),
            "layers.1.v_up: expected finite values, found 3 of 3072 not finite",
        ),
    ],
)
def test_bad_factors_are_named(factors_file, change, message):
    rewrite(factors_file, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_reader(factors_file)
    assert str(factors_file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file; expected the factors"):
        FactorReader(tmp_path / FACTORS_FILE, CONFIG, GEOMETRY)
    with pytest.raises(CheckpointError, match="no such file; expected a model directory"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_hf_config(tmp_path)


def test_recorded_digest(factors_file):
    recorded = replace(CONFIG, factors_sha256=file_sha256(factors_file))
    assert RecalkvConfig.from_hf_config(json.loads(json.dumps(hf_config(recorded)))) == recorded
    assert "factors_sha256" not in CONFIG.to_dict()
    with FactorReader(factors_file, recorded, GEOMETRY) as reader:
        reader.check()
    content = bytearray(factors_file.read_bytes())
    content[-4] ^= 1  # the lowest bit of the last number
    factors_file.write_bytes(content)
    with FactorReader(factors_file, CONFIG, GEOMETRY) as reader:
        reader.check()
    with (
        FactorReader(factors_file, recorded, GEOMETRY) as reader,
        pytest.raises(CheckpointError, match=f"expected SHA-256 {recorded.factors_sha256}.* found"),
    ):
        reader.check()


@pytest.mark.parametrize("digest", [None, "", "0" * 63, "G" * 64, 7])
def test_what_is_no_digest(digest):
    raw = {**CONFIG.to_dict(), "factors_sha256": digest}
    with pytest.raises(CheckpointError, match="factors_sha256: expected 64 hexadecimal digits"):
        RecalkvConfig.from_hf_config({**HF_CONFIG, "recalkv": raw})
