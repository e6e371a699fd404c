"""Method kfac through the whole pipeline, on tiny models."""

import pytest
import torch

from recalkv_vllm.checkpoint import rank_budget
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.options import CompressOptions
from recalkv_vllm.compression.pipeline import compress
from tests.compression.test_compress import FEW, logits, read, weights


def options(base, out, compression=0.5, **changes):
    plain = {"latent_dtype": "bf16", "target": "none"}
    return CompressOptions(str(base), out, compression, **{**FEW, **plain, **changes})


@pytest.mark.parametrize(
    ("family", "spans", "size", "compression"),
    [
        ("llama_bias", "nested", 1, 0.5),
        ("llama_bias", "nested", 2, 0.3),
        ("llama_bias", "joint", 2, 0.7),
        ("llama_bias", "split", 2, 0.5),
        ("qwen2", "nested", 4, 0.7),
        ("qwen2", "joint", 1, 0.3),
        ("qwen2", "joint", 4, 0.5),
        ("qwen2", "split", 4, 0.7),
    ],
)
def test_spans_and_budget(tiny_models, tmp_path, family, spans, size, compression):
    base, out = tiny_models[family], tmp_path / "out"
    summary = compress(
        options(base, out, compression, spans=spans, k_group_size=size, target="none")
    )
    recalkv, geometry, factors = read(out)
    budget = rank_budget(compression, geometry)
    used = recalkv.cached_elements_per_token()
    groups = 4 // size
    # Short of the budget by less than one step of the cheapest kind.
    assert budget - 16 * groups < used <= budget
    assert recalkv.settings["spans"] == spans
    assert recalkv.settings["v_groups"] == (1 if spans == "split" else groups)
    for layout, layer in zip(recalkv.layers, factors, strict=True):
        assert layout.k_group_size == size
        if spans == "joint":
            assert layout.k_spans == layout.v_spans
        if spans == "nested":
            assert all(
                k[0] == v[0] and k[1] - k[0] == min(v[1] - v[0], size * 16)
                for k, v in zip(layout.k_spans, layout.v_spans, strict=True)
            )
        assert layer["k_up"].isfinite().all()
    assert summary["reconstruct_flop_per_token"] == sum(
        2 * 64 * layout.k_width for layout in recalkv.layers
    )
    assert torch.isfinite(logits(out)).all()


@pytest.mark.parametrize("limit", [0.8, 1.1])
def test_budget_of_decode_time(tiny, tmp_path, limit):
    """Of all groupings within the budget, the one that loses least."""
    out, target = tmp_path / "out", f"cpu:{limit}"
    compress(options(tiny, out, target=target))
    recalkv, _, _ = read(out)
    assert 0.5 < recalkv.settings["relative_decode_time"] <= limit
    assert recalkv.settings["target"] == target
    losses = {}
    for size in (1, 2, 4):
        directory = tmp_path / str(size)
        compress(options(tiny, directory, target=target, k_group_size=size))
        losses[size] = read(directory)[0].settings["expected_loss"]
    assert recalkv.settings["expected_loss"] == min(losses.values())
    assert recalkv.settings["k_group_size"] == min(losses, key=losses.get)


@pytest.mark.parametrize("latent_dtype", ["bf16", "auto"])
def test_what_the_limit_of_decode_time_costs(tiny, tmp_path, latent_dtype):
    limited, free = tmp_path / "limited", tmp_path / "free"
    told = compress(options(tiny, limited, 0.7, target="cpu:0.5", latent_dtype=latent_dtype))
    compress(options(tiny, free, 0.7, latent_dtype=latent_dtype))
    expected = read(free)[0].settings
    assert told["expected_loss_anywhere"] == expected["expected_loss"] < told["expected_loss"]
    assert read(limited)[0].settings["expected_loss_anywhere"] == expected["expected_loss"]
    assert expected["expected_loss_anywhere"] == expected["expected_loss"]


def test_expected_loss_rises_with_less_freedom(tiny, tmp_path):
    """Sharing a latent, and sharing it among more heads, never loses more."""
    losses = {}
    for name, changes in {
        "joint 4": {"spans": "joint", "k_group_size": 4},
        "nested 4": {"spans": "nested", "k_group_size": 4},
        "nested 4 at 0.8": {"spans": "nested", "k_group_size": 4, "target": "cpu:0.8"},
        "joint 1": {"spans": "joint", "k_group_size": 1},
        "split 4": {"spans": "split", "k_group_size": 4},
    }.items():
        out = tmp_path / name
        compress(options(tiny, out, **{"target": "none", **changes}))
        losses[name] = read(out)[0].settings["expected_loss"]
    assert losses["joint 4"] == pytest.approx(losses["nested 4"])
    assert losses["joint 4"] < losses["nested 4 at 0.8"]
    assert losses["joint 4"] < losses["joint 1"]
    assert losses["joint 4"] < losses["split 4"]


@pytest.mark.parametrize("family", ["llama_bias", "qwen2"])
def test_compression_zero_is_exact(tiny_models, tmp_path, family):
    base, out = tiny_models[family], tmp_path / "out"
    summary = compress(options(base, out, 0.0))
    recalkv, _, factors = read(out)
    assert summary["compression"] == 0
    assert recalkv.calibration == {}
    before, after = weights(base), weights(out)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for layer in factors:
        assert torch.equal(layer["k_up"].float(), torch.eye(16).expand(4, -1, -1))


def test_a_joint_latent_never_needs_more_than_the_hidden_state(tiny, tmp_path):
    """Its 96 elements hold all that 128 of the dense cache do."""
    out = tmp_path / "out"
    summary = compress(options(tiny, out, 0.1, dtype="float32"))
    assert summary["compression"] == 0.25
    torch.testing.assert_close(logits(out), logits(tiny), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "64"}, "target '64': expected auto, h100"),
        ({"v_groups": 2}, "with nested spans values are grouped as keys are"),
        ({"rank_allocation": "fisher"}, "not known to method kfac; expected loss"),
        ({"target": "tpu"}, "target 'tpu': expected auto, h100"),
        ({"num_samples": 3}, "96 tokens are too few; expected at least 128"),
        ({"method": "palu", "spans": "joint"}, "not known to method palu; expected split"),
    ],
)
def test_bad_input(tiny, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        compress(options(tiny, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_largest_possible_compression_is_accepted(tiny, tmp_path):
    with pytest.raises(InputError, match=r"largest possible compression .* is 0\.875"):
        compress(options(tiny, tmp_path / "out", 0.95))
    compress(options(tiny, tmp_path / "out", 0.875))


def test_same_bits_twice(tiny, tmp_path, monkeypatch):
    for name in ("a", "b"):
        monkeypatch.setenv("RECALKV_CACHE", str(tmp_path / f"cache-{name}"))
        compress(options(tiny, tmp_path / name))
    for file in ("config.json", "model.safetensors", "recalkv.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
