"""One requirement each, with one form of message: argument, expected, found."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recalkv_vllm.span import Span

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Spans, ranks and blocks of the paged cache come in multiples of this.
MULTIPLE = 16


def require(condition: bool, name: str, expected: object, found: object) -> None:
    """Raises :class:`ValueError` unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, found {found}")


def require_dtype(tensor: torch.Tensor, name: str, *dtypes: torch.dtype) -> None:
    """Raises :class:`TypeError` for any other dtype."""
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected dtype {names}, found {found}")


def require_shape(tensor: torch.Tensor, name: str, *shape: int | str) -> None:
    """``shape`` has sizes, or names of sizes that are free."""
    found = tensor.shape
    if len(found) == len(shape):
        # Not any() or all(): their generator would cost more than the comparisons.
        for want, got in zip(shape, found, strict=True):
            if want != got and not isinstance(want, str):
                break
        else:
            return
    raise ValueError(f"{name}: expected shape [{', '.join(map(str, shape))}], found {list(found)}")


def require_device(tensor: torch.Tensor, name: str, device: torch.device) -> None:
    """Raises :class:`ValueError` for a tensor elsewhere."""
    require(tensor.device == device, name, f"device {device}", tensor.device)


def require_spans(spans: Sequence[Span], name: str, width: int) -> None:
    """All ``width`` wide and on the grid of :data:`MULTIPLE` columns."""
    for i, span in enumerate(spans):
        found = tuple(span)
        require(
            0 <= span.start < span.end and span.start % MULTIPLE == 0 and span.end % MULTIPLE == 0,
            f"{name}[{i}]",
            f"start and end at multiples of {MULTIPLE}, start before end",
            found,
        )
        require(span.width == width, f"{name}[{i}]", f"a span {width} wide", found)
