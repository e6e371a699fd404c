"""Modules in the place of torchvision, whose builds that pip finds do not go with a CPU's torch.

vLLM's models of images import transformers' image processors on torchvision, and use those on PIL
where there is none.
"""

import sys
from types import ModuleType

from transformers.utils import is_torchvision_available


def pretend_torchvision() -> None:
    """Let ``torchvision.transforms.v2.functional`` be imported; there is nothing in it."""
    if is_torchvision_available():  # it remembers what it found
        return
    name = "torchvision.transforms.v2.functional"
    parent = None
    for part in name.split("."):
        path = part if parent is None else f"{parent.__name__}.{part}"
        module = ModuleType(path)
        if parent is not None:
            setattr(parent, part, module)
        sys.modules[path] = parent = module
