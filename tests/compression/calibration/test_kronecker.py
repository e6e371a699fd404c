"""Kronecker factors: those of the tokens' true gradients, streamed."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from recalkv_vllm.cache_directory import cache_directory
from recalkv_vllm.compression.base_model.attention import attention_modules
from recalkv_vllm.compression.calibration import calibration_pass, kronecker, statistics
from recalkv_vllm.compression.calibration.first_rows import FirstRows
from recalkv_vllm.compression.calibration.kronecker import flip_flop
from recalkv_vllm.compression.calibration.statistics import collect
from recalkv_vllm.compression.calibration.sum_store import SumStore, read_complete
from recalkv_vllm.compression.errors import InputError

SAMPLES = torch.randint(1, 512, (40, 24), generator=torch.Generator().manual_seed(0))
WIDTH = 128


def tokens_of(model, samples):
    """Inputs and gradients of both projections of all tokens, per layer, by plain autograd."""
    layers = [([], []) for _ in attention_modules(model)]
    for sample in samples:
        outputs = []
        handles = []
        for (inputs, _), attention in zip(layers, attention_modules(model), strict=True):

            def hook(_, args, output, inputs=inputs, outputs=outputs, keep=True):
                output.retain_grad()
                outputs.append(output)
                if keep:
                    inputs.append(args[0][0].detach())

            handles.append(attention.k_proj.register_forward_hook(hook))
            handles.append(
                attention.v_proj.register_forward_hook(
                    lambda *args, hook=hook: hook(*args, keep=False)
                )
            )
        loss = model(sample[None], labels=sample[None]).loss * (len(sample) - 1)
        loss.backward()
        for handle in handles:
            handle.remove()
        for i, (_, gradients) in enumerate(layers):
            pair = [output.grad[0] for output in outputs[2 * i : 2 * i + 2]]
            gradients.append(torch.cat(pair, dim=1))
    return [(torch.cat(x), torch.cat(g)) for x, g in layers]


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_factors_are_those_of_the_true_gradients(geometry, load, monkeypatch):
    """With a pilot of all samples, the pass is one more round of the iteration."""
    monkeypatch.setattr(kronecker, "PILOT_TOKENS", 100)
    found = collect({"kronecker"}, SAMPLES, geometry, "key", load)
    for layer, (x, g) in enumerate(tokens_of(load(), SAMPLES)):
        factors = found.kronecker(layer)
        inputs, outputs = flip_flop(x, g, rounds=kronecker.ROUNDS + 1)
        product = torch.kron(factors.outputs[:8, :8], factors.inputs)
        expected = torch.kron(outputs[:8, :8], inputs)
        # The pass takes both sums at once, the iteration one after the other.
        assert relative(product, expected) < 0.05
        assert factors.inputs.dtype == torch.float64


def test_a_short_pilot_is_nearly_as_good(geometry, load):
    """The expected loss of random changes, against the loop over all tokens."""
    found = collect({"kronecker"}, SAMPLES, geometry, "key", load)
    generator = torch.Generator().manual_seed(0)
    for layer, (x, g) in enumerate(tokens_of(load(), SAMPLES)):
        factors = found.kronecker(layer)
        ratios = []
        for _ in range(10):
            change = torch.randn(WIDTH, 96, generator=generator, dtype=torch.float64)
            expected = torch.trace(factors.outputs @ change @ factors.inputs @ change.T)
            true = ((g.double() @ change) * x.double()).sum(dim=1).square().mean()
            ratios.append(float(expected / true))
        assert 0.5 < sum(ratios) / len(ratios) < 2


def test_flip_flop_recovers_planted_factors():
    """Tokens of a Kronecker covariance: the maximum-likelihood factors, up to one scale."""
    generator = torch.Generator().manual_seed(1)
    root_a = torch.randn(6, 6, generator=generator) + 2 * torch.eye(6)
    root_g = torch.randn(4, 4, generator=generator) + 2 * torch.eye(4)
    # Rank-one terms g xᵀ cannot follow a matrix normal, but x and g may be independent.
    x = torch.randn(50_000, 6, generator=generator) @ root_a.T
    g = torch.randn(50_000, 4, generator=generator) @ root_g.T
    a, outputs = flip_flop(x, g)
    expected = torch.kron(root_g @ root_g.T, root_a @ root_a.T).double()
    assert relative(torch.kron(outputs, a), expected) < 0.05


def test_tokens_whose_inputs_and_gradients_are_large_together():
    """Attention sinks: one token in 64 with both 300 times larger, in directions of their own.

    What a change in these directions costs is off by the square root of what plain moments miss.
    """
    generator = torch.Generator().manual_seed(2)
    x, g = torch.randn(2, 6400, 8, generator=generator)
    x[::64] = g[::64] = 300 * torch.eye(8)[0]
    true = float((x[:, 0] * g[:, 0]).double().square().mean())
    a, outputs = flip_flop(x, g)
    plain = float((x[:, 0].square().mean() * g[:, 0].square().mean()).double())
    assert true / plain > 60
    assert 1 < true / float(a[0, 0] * outputs[0, 0]) < 10


def test_frozen_weights_and_recomputed_activations(geometry, load, monkeypatch):
    kept = collect({"kronecker", "moments"}, SAMPLES, geometry, "kept", load)
    monkeypatch.setattr(calibration_pass, "ACTIVATION_BYTES", 0)
    again = collect({"kronecker", "moments"}, SAMPLES, geometry, "recomputed", load)
    for layer in range(geometry.num_layers):
        for name in ("inputs", "outputs"):
            torch.testing.assert_close(
                getattr(kept.kronecker(layer), name),
                getattr(again.kronecker(layer), name),
                rtol=1e-3,
                atol=1e-6,
            )
        assert again.inputs(layer) is not None


def test_resuming_gives_the_same_bits(geometry, load, monkeypatch, tmp_path):
    class InterruptionError(Exception):
        pass

    straight = collect({"kronecker"}, SAMPLES, geometry, "key", load)
    monkeypatch.setenv("RECALKV_CACHE", str(tmp_path / "other"))
    real = SumStore.sample_done

    def sample_done(self):
        self.snapshot_seconds = 0
        real(self)
        if self.samples_done == 30:
            raise InterruptionError

    monkeypatch.setattr(SumStore, "sample_done", sample_done)
    with pytest.raises(InterruptionError):
        collect({"kronecker"}, SAMPLES, geometry, "key", load)
    monkeypatch.setattr(SumStore, "sample_done", real)
    resumed = collect({"kronecker"}, SAMPLES, geometry, "key", load)
    for layer in range(geometry.num_layers):
        assert torch.equal(straight.kronecker(layer).inputs, resumed.kronecker(layer).inputs)
        assert torch.equal(straight.kronecker(layer).outputs, resumed.kronecker(layer).outputs)


@pytest.mark.parametrize("names", [{"kronecker", "moments"}, {"kronecker", "fisher"}])
def test_first_samples_run_once_where_rows_are_kept(geometry, load, monkeypatch, names):
    runs = []
    real = calibration_pass._run_sample

    def run_sample(*args):
        runs.append(args)
        real(*args)

    monkeypatch.setattr(calibration_pass, "_run_sample", run_sample)
    # float32 rows are what the model computes: on disk they are the same bits.
    collect(names, SAMPLES, geometry, "kept", load)
    (directory,) = cache_directory().glob("*/kept/*")
    assert len(runs) == len(SAMPLES)
    assert sorted(path.name for path in directory.iterdir()) == ["complete", "lock"]
    kept, _ = read_complete(directory)
    runs.clear()
    monkeypatch.setattr(
        calibration_pass, "FirstRows", lambda measure, _: FirstRows(measure, directory=None)
    )
    collect(names, SAMPLES, geometry, "again", load)
    again, _ = read_complete(next(cache_directory().glob("*/again/*")))
    first = kronecker.KroneckerFactors().samples_to_prepare(SAMPLES, kept)
    assert 0 < first < len(SAMPLES)
    assert len(runs) == len(SAMPLES) + first
    for name, array in again.items():
        if name == "fisher":  # by autograd, in another order
            np.testing.assert_allclose(kept[name], array, rtol=1e-3, atol=1e-6)
        else:
            assert np.array_equal(kept[name], array), name


def test_too_few_tokens(geometry, load):
    with pytest.raises(InputError, match="120 tokens are too few; expected at least 128"):
        collect({"kronecker"}, SAMPLES[:5], geometry, "key", load)


def test_gradients_that_are_not_finite_or_zero(geometry, load):
    def broken(value):
        model = load()
        model.model.norm.weight.data.fill_(value)
        return model

    with pytest.raises(InputError, match="gradients of layer 0 are not finite"):
        collect({"kronecker"}, SAMPLES, geometry, "inf", lambda: broken(float("inf")))
    with pytest.raises(InputError, match="gradients of layer 0 are all zero"):
        collect({"kronecker"}, SAMPLES, geometry, "zero", lambda: broken(0.0))


def test_statistics_know_what_they_lack(geometry, load):
    found = collect({"moments"}, SAMPLES, geometry, "key", load)
    assert found.kronecker(0) is None
    assert set(statistics.OBSERVERS) == {"moments", "fisher", "kronecker"}


def test_rounds_stay_on_the_device_of_the_model(monkeypatch):
    """Sums are in memory; what weighs tokens is where they are. Fake tensors tell devices apart."""
    tokens, hidden, width = 8, 6, 4
    shapes = {"input": (1, hidden, hidden), "gradient": (1, width, width), "weight": (1,)}
    with FakeTensorMode():
        observer = kronecker.KroneckerFactors()

        def rows_of(index):
            x, g = (torch.randn(tokens, n, device="cuda") for n in (hidden, width))
            return [(x, g)]

        def pilot(samples):
            x, g = (torch.randn(n, n, device="cuda") for n in (hidden, width))
            return [(x, g)]

        monkeypatch.setattr(observer, "_pilot", pilot)
        sums = {f"kronecker_{name}": torch.zeros(shape) for name, shape in shapes.items()}
        samples = torch.zeros(40, tokens, dtype=torch.long)
        observer.prepare(samples, sums, rows_of)
        observer.add_rows(rows_of(0), sums)
        assert {each.device.type for pair in observer._inverses for each in pair} == {"cuda"}
        assert {each.device.type for each in sums.values()} == {"cpu"}
