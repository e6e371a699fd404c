"""Calibration statistics: what they are, and that interruptions leave no trace."""

import numpy as np
import pytest
import torch

from recalkv_vllm.cache_directory import cache_directory
from recalkv_vllm.compression.base_model.attention import attention_modules
from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.calibration import calibration_pass
from recalkv_vllm.compression.calibration.statistics import collect
from recalkv_vllm.compression.calibration.sum_store import SumStore, is_complete, read_complete
from recalkv_vllm.compression.errors import InputError

SAMPLES = torch.randint(1, 512, (6, 24), generator=torch.Generator().manual_seed(0))
BOTH = {"moments", "fisher"}


def test_moments_are_those_of_the_projections_input(geometry, load):
    found = collect({"moments"}, SAMPLES, geometry, "key", load)
    model = load()
    for layer, attention in enumerate(attention_modules(model)):
        seen = []
        attention.v_proj.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            for sample in SAMPLES:
                model(sample[None])
        x = torch.cat(seen, dim=1)[0].double()
        inputs = found.inputs(layer)
        torch.testing.assert_close(inputs.second_moment, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inputs.mean, x.mean(0), rtol=1e-4, atol=1e-5)
        assert inputs.second_moment.dtype == torch.float64


@pytest.mark.parametrize("logit_chunk", [7, 128])
def test_fisher_is_the_squared_gradient_of_the_loss(geometry, load, monkeypatch, logit_chunk):
    monkeypatch.setattr(calibration_pass, "LOGIT_CHUNK", logit_chunk)
    found = collect({"fisher"}, SAMPLES, geometry, "key", load)
    model = load()
    expected = np.zeros((geometry.num_layers, 2, 64, geometry.hidden_size))
    for sample in SAMPLES:
        model.zero_grad()
        loss = model(sample[None], labels=sample[None]).loss * (len(sample) - 1)  # of the sum
        loss.backward()
        for layer, attention in enumerate(attention_modules(model)):
            for column, projection in enumerate((attention.k_proj, attention.v_proj)):
                expected[layer, column] += projection.weight.grad.square().numpy()
    for layer in range(geometry.num_layers):
        np.testing.assert_allclose(
            found.fisher(layer), expected[layer] / len(SAMPLES), rtol=1e-3, atol=1e-9
        )


def test_recomputed_activations_are_not_counted_twice(geometry, load, monkeypatch):
    kept = collect(BOTH, SAMPLES, geometry, "kept", load)
    monkeypatch.setattr(calibration_pass, "ACTIVATION_BYTES", 0)
    recomputed = collect(BOTH, SAMPLES, geometry, "recomputed", load)
    for layer in range(geometry.num_layers):
        a, b = kept.inputs(layer), recomputed.inputs(layer)
        torch.testing.assert_close(a.second_moment, b.second_moment, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            kept.fisher(layer), recomputed.fisher(layer), rtol=1e-4, atol=1e-9
        )


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("interrupted_twice", [False, True])
def test_resuming_gives_the_same_bits(
    geometry, load, monkeypatch, tmp_path, after, interrupted_twice
):
    monkeypatch.setenv("RECALKV_CACHE", str(tmp_path / "straight"))
    collect(BOTH, SAMPLES, geometry, "key", load)
    straight = next((tmp_path / "straight").glob("*/key/*"))

    monkeypatch.setenv("RECALKV_CACHE", str(tmp_path / "interrupted"))
    real = SumStore.sample_done
    calls = []

    def sample_done(self):
        self.snapshot_seconds = 0 if self.samples_done % 2 else 1e9  # a snapshot every other time
        real(self)
        calls.append(self.samples_done)
        if len(calls) == after:
            raise InterruptionError

    monkeypatch.setattr(SumStore, "sample_done", sample_done)
    for _ in range(1 + interrupted_twice):
        calls.clear()
        with pytest.raises(InterruptionError):
            collect(BOTH, SAMPLES, geometry, "key", load)
    directory = next((tmp_path / "interrupted").glob("*/key/*"))
    assert not is_complete(directory)
    monkeypatch.setattr(SumStore, "sample_done", real)
    collect(BOTH, SAMPLES, geometry, "key", load)

    sums, counts = read_complete(directory)
    expected, expected_counts = read_complete(straight)
    assert counts == expected_counts == {"samples": 6, "tokens": 144}
    assert set(sums) == set(expected) == {"input_outer", "input", "fisher"}
    for name in sums:
        assert np.array_equal(sums[name], expected[name]), name
    assert sorted(p.name for p in directory.iterdir()) == ["complete", "lock"]


def test_resuming_does_not_start_over(geometry, load, monkeypatch):
    """Work done before a snapshot is not done again."""
    real = SumStore.sample_done
    done = []

    def sample_done(self):
        self.snapshot_seconds = 0
        real(self)
        done.append(self.samples_done)
        if done == [1, 2, 3]:
            raise InterruptionError

    monkeypatch.setattr(SumStore, "sample_done", sample_done)
    with pytest.raises(InterruptionError):
        collect({"moments"}, SAMPLES, geometry, "key", load)
    collect({"moments"}, SAMPLES, geometry, "key", load)
    assert done == [1, 2, 3, 4, 5, 6]


def test_finished_statistics_are_reused(geometry, load, caplog):
    """Also by a method that asks for less than what is there."""
    caplog.set_level("INFO")
    collect(BOTH, SAMPLES, geometry, "key", load)

    def no_model():
        raise AssertionError("a pass where none is needed")

    for names in (BOTH, {"moments"}, {"fisher"}):
        collect(names, SAMPLES, geometry, "key", no_model)
    assert caplog.text.count("reusing") == 3


def test_not_finite_statistics_are_refused(geometry, load):
    def broken():
        model = load()
        model.model.layers[1].input_layernorm.weight.data.fill_(float("inf"))
        return model

    with pytest.raises(InputError, match="of layer 1 is not finite"):
        collect({"moments"}, SAMPLES, geometry, "key", broken)


def test_sums_are_float32_whatever_the_model_computes_in(tiny, geometry):
    """Half-precision Gram matrices overflow: inputs of 1000 over 144 tokens sum to 1.4e8."""

    def load():
        model = BaseModel(tiny).load(torch.float16, "cpu")
        model.model.layers[0].input_layernorm.weight.data.fill_(1000.0)
        return model

    moment = collect({"moments"}, SAMPLES, geometry, "key", load).inputs(0).second_moment
    assert moment.diagonal().max() > torch.finfo(torch.float16).max
    assert torch.linalg.eigvalsh(moment).min() > -1e-6 * torch.linalg.eigvalsh(moment).max()


def test_cache_location(monkeypatch, tmp_path):
    monkeypatch.delenv("RECALKV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "recalkv"
