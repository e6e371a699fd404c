"""The command line of ``recalkv compress`` that stands for given options."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from recalkv_vllm.names import CPU_SAMPLES

if TYPE_CHECKING:
    from recalkv_vllm.compression.options import CompressOptions

#: Options whose value ``explore`` varies, in the order of the command.
VARIED = ("compression", "latent_dtype", "k_group_size")


def compress_command(options: CompressOptions, shown: Mapping[str, str] | None = None) -> str:
    """A shell command; options at their defaults are left out, unless machines differ in them.

    Args:
        options: of the compression; none of them a switch.
        shown: what to show in place of the values of some.
    """
    shown = shown or {}
    given: list[Any] = ["recalkv", "compress", options.model, "-o", shown.get("out", options.out)]
    ordered = sorted(fields(options), key=lambda field: field.name not in VARIED)
    for field in ordered:
        value = getattr(options, field.name)
        if field.name == "datasets":
            if value != field.default:
                given += [part for name in value for part in ("--dataset", name)]
        elif field.name in CPU_SAMPLES or (field.default is not MISSING and value != field.default):
            given += ["--" + field.name.replace("_", "-"), shown.get(field.name, value)]
    return shlex.join(map(str, given))
