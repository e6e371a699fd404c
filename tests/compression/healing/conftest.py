"""A small student of random factors, and what it trains on."""

import pytest
import torch

from recalkv_vllm.band_format import BandFormat
from recalkv_vllm.compression.calibration.calibration_pass import freeze
from recalkv_vllm.compression.healing import state
from recalkv_vllm.compression.healing.student import Student
from recalkv_vllm.compression.layer import LayerFactors, nested_layout
from recalkv_vllm.latent_format import LatentFormat

#: Of both layers.
FORMATS = {
    "plain": (None, None),
    "int4": (LatentFormat("int4", 32),) * 2,
    "bands": (BandFormat(((32, 6), (32, 3))), BandFormat(((64, 4),))),
}
IDS = torch.randint(1, 512, (6, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def factors(geometry):
    """Random factors of heads in an order of their own."""
    layout = nested_layout((2, 0, 3, 1), k_group_size=2, k_width=16, width=32)
    generator = torch.Generator().manual_seed(0)

    def layer():
        shapes = layout.factor_shapes(geometry)
        parts = [0.2 * torch.randn(shapes[n], generator=generator) for n in shapes]
        return LayerFactors(layout, *parts)

    return [layer() for _ in range(geometry.num_layers)]


@pytest.fixture
def student(load, factors):
    def make(*latent_formats, train_weights=True):
        model = load()
        freeze(model, gradient=True, seq_len=IDS.shape[1])
        return Student(model, load(), factors, latent_formats or FORMATS["plain"], train_weights)

    return make


@pytest.fixture
def state_file(tmp_path):
    return lambda: state.StateFile(tmp_path / "state.safetensors")
