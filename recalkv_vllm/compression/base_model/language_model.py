"""The language model within a model of several modalities: what its tensors are called, and alone.

transformers and vLLM have used two orders of names for it; by itself it has those of any model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM

_PREFIX = re.compile(r"^(model\.language_model|language_model\.model)\.")
_HEAD = re.compile(r"^language_model\.lm_head\.")


def language_name(name: str) -> str:
    """A tensor's name in the language model by itself; other tensors keep theirs."""
    return _HEAD.sub("lm_head.", _PREFIX.sub("model.", name))


def load_language_model(
    config: Any, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> Any:
    """What ``from_pretrained`` gives of the language model by itself, with loading information.

    Args:
        config: transformers' of the language model.
        tensors: of the whole model, by name.
        dtype: of the weights.
    """
    if hasattr(config, "attention_dropout"):
        config.attention_dropout = 0.0
    renamed = {language_name(name): tensor for name, tensor in tensors.items()}
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    names = network.state_dict().keys()
    own = {name: tensor for name, tensor in renamed.items() if name in names}
    model_class: Any = type(network)
    return model_class.from_pretrained(
        None, config=config, dtype=dtype, state_dict=own, output_loading_info=True
    )
