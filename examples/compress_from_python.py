"""Compress a model: ``python examples/compress_from_python.py MODEL OUT``.

It does what ``recalkv compress`` does, and takes the same options.
"""

import logging
import sys

from recalkv_vllm import compress


def main(model: str, out: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # shows progress
    made = compress(
        model,
        out,
        compression=0.75,
        dataset="builtin",  # Better: text like that which will be served.
        num_samples=16,  # Few, and short ones, to be quick; without these, as many as is good.
        seq_len=128,
    )
    sizes = made["kv_bytes_per_token"]
    print(f"{made['out']}: {sizes['compressed']} bytes per token instead of {sizes['dense']}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
