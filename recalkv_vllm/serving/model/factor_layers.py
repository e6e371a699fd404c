"""Where a rank keeps its part of a layer's factors: modules whose loaders cut it out of the whole.

Each parameter is a module of its own: vLLM reloads weights module by module, and what a partial
update lacks of a module with several would stay uninitialized.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.utils import set_weight_attrs

from recalkv_vllm.checkpoint import CheckpointError


class LatentDown(ReplicatedLinear):
    """The rows of ``down: [rank, hidden_size]`` that give the latent's columns cached here.

    They differ from rank to rank, but no rank holds a slice that vLLM could cut.
    """

    def __init__(self, hidden_size: int, columns: Sequence[int], prefix: str):
        self._columns = list(columns)
        super().__init__(
            hidden_size, len(self._columns), bias=False, quant_config=None, prefix=prefix
        )

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor) -> None:
        super().weight_loader(param, loaded_weight[self._columns])


class PerHead(nn.Module):
    """``weight: [KV heads of this rank, *shape]``, loaded from a tensor of all heads in turn.

    Args:
        heads: this rank's KV heads.
        num_heads: KV heads of the model.
        shape: of one head.
    """

    def __init__(self, heads: range, num_heads: int, *shape: int):
        super().__init__()
        self._heads, self._whole = heads, (num_heads, *shape)
        self.weight = nn.Parameter(torch.empty(len(heads), *shape), requires_grad=False)
        set_weight_attrs(self.weight, {"weight_loader": self.weight_loader})

    # When it reloads, vLLM looks for an argument `param`.
    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor) -> None:
        whole = loaded_weight.reshape(self._whole)
        param.data.copy_(whole[self._heads.start : self._heads.stop])

    def get_parameter(self, target: str) -> nn.Parameter:
        """Refused: vLLM asks it to write weights in kernel format, which kernels would not see."""
        raise CheckpointError(
            "recalkv: reload_weights: factors are loaded in checkpoint format only; expected "
            "is_checkpoint_format=True"
        )
