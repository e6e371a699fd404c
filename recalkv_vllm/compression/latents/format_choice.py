"""How latents are stored, and what that leaves of a budget of bytes for their elements."""

from __future__ import annotations

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.latents.rounding_error import rounding_error
from recalkv_vllm.compression.plan import Budget
from recalkv_vllm.latent_format import SCALE_BYTES, LatentFormat
from recalkv_vllm.names import LATENT_DTYPES

#: Elements per scale.
GROUP_SIZE = 32


def chosen_latent_dtype(name: str, chooses: bool, compression: float) -> str:
    """What ``--latent-dtype`` stands for.

    Args:
        name: one of :data:`recalkv_vllm.names.LATENT_DTYPES`. ``auto`` is ``bands`` where the
            method knows what bits are worth, ``bf16`` elsewhere.
        chooses: the method does.
        compression: fraction of 16-bit bytes to remove; without any there is nothing to choose.

    Raises:
        InputError: an unknown name, or ``bands`` where there is nothing to choose by.
    """
    if name not in LATENT_DTYPES:
        raise InputError(f"--latent-dtype {name}: expected one of {', '.join(LATENT_DTYPES)}")
    if name == "auto":
        return "bands" if chooses and compression > 0 else "bf16"
    if name == "bands" and not chooses:
        raise InputError("--latent-dtype bands: only method kfac knows what bits are worth")
    if name == "bands" and compression == 0:
        raise InputError("--latent-dtype bands: expected a --compression above 0")
    return name


def budget_of(compression: float, geometry: AttentionGeometry, latent_dtype: str) -> Budget:
    """What a plan for latents that are stored so may spend.

    Args:
        compression: fraction of 16-bit bytes to remove.
        geometry: of the model.
        latent_dtype: as :func:`chosen_latent_dtype` gives it; ``bf16`` stands for the dtype of the
            factors, whatever it is.
    """
    if latent_dtype in ("bands", "bf16"):
        return Budget(compression)
    latent_format = LatentFormat(latent_dtype, GROUP_SIZE)
    elements = rank_compression(compression, geometry, latent_format)
    return Budget(elements, latent_format, rounding_error(latent_format))


def rank_compression(
    compression: float, geometry: AttentionGeometry, latent_format: LatentFormat
) -> float:
    """Fraction of cached elements to remove so that ``compression`` of 16-bit bytes is removed.

    Not below 0: a format may remove more than was asked for without any help.
    """
    dense = geometry.dense_width * geometry.num_layers
    # A rank that ends inside a group pays for a scale that it uses only half: a byte.
    kept_bytes = (1 - compression) * 2 * dense - geometry.num_layers
    bits = latent_format.bits + 8 * SCALE_BYTES / latent_format.group_size
    return max(0.0, 1 - kept_bytes * 8 / bits / dense)
