"""Sizes in bytes on the command line."""

from __future__ import annotations

import argparse
import re

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def size(text: str) -> int:
    """Bytes, with a decimal (GB) or binary (GiB) unit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"expected bytes such as 80GiB or 512MiB, found {text!r}")
    return int(float(found[1]) * UNITS[found[2] or ""])
