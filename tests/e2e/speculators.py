"""Heads that speculate for a small model, made so that some of what they propose is right.

A head's projection is fitted to texts that the model continued: from what the head is given at a
token, to the model's own row of the token after the next. Its attention is random, and changes what
the head proposes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.e2e.architectures import SIZES

HIDDEN, VOCABULARY = SIZES["hidden_size"], SIZES["vocab_size"]
HEAD_DIM = HIDDEN // SIZES["num_attention_heads"]
KV_WIDTH = SIZES["num_key_value_heads"] * HEAD_DIM
#: One decoder layer, as heads of EAGLE have; vLLM takes it for a Llama's.
LAYER = {
    **{name: value for name, value in SIZES.items() if not name.endswith("_token_id")},
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "head_dim": HEAD_DIM,
    "rms_norm_eps": 1e-6,
}


@dataclass(frozen=True)
class Continued:
    """What a model computed at the tokens of texts that it continued.

    Args:
        hidden: ``[tokens, hidden_size]``, normed as the last layer's output is.
        layers: ``[tokens, layers · hidden_size]`` the first layers' inputs, the later ones first.
        following: ``[tokens, hidden_size]`` embedding of the next token.
        texts: of each token, the tokens after the next.
        rows: ``[vocab_size, hidden_size]`` of the model's output projection.
    """

    hidden: torch.Tensor
    layers: torch.Tensor
    following: torch.Tensor
    texts: list[list[int]]
    rows: torch.Tensor

    def wanted(self, ahead: int = 0) -> torch.Tensor:
        """The token that is ``ahead`` of the one after the next; -1 past the end of a text."""
        return torch.tensor([text[ahead] if ahead < len(text) else -1 for text in self.texts])


def continued(model: Path, prompts: list[list[int]], answers: list[list[int]]) -> Continued:
    """Run ``model`` over prompts with their answers."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    hidden, layers, following, texts = [], [], [], []
    with torch.no_grad():
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([prompt + answer])
            states = network.model(ids, output_hidden_states=True)
            # The token that gives an answer's first token is the prompt's last.
            own = slice(len(prompt) - 1, -2)
            hidden.append(states.last_hidden_state[0, own])
            layers.append(torch.cat([states.hidden_states[i][0, own] for i in (2, 1, 0)], dim=-1))
            following.append(network.get_input_embeddings()(ids)[0, len(prompt) : -1])
            texts += [answer[i + 1 :] for i in range(len(answer) - 1)]
    rows = network.get_output_embeddings().weight.detach()
    return Continued(*map(torch.cat, (hidden, layers, following)), texts, rows)


def fitted(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """``[outputs, inputs]`` the smallest matrix that maps ``inputs`` to ``outputs``."""
    return torch.linalg.lstsq(inputs.double(), outputs.double(), driver="gelsd").solution.T.float()


def attention_and_mlp(prefix: str, inputs: int = HIDDEN) -> dict[str, torch.Tensor]:
    """Random weights of a decoder layer whose attention reads ``inputs`` elements."""
    torch.manual_seed(0)
    shapes = {
        "self_attn.q_proj": (HIDDEN, inputs),
        "self_attn.k_proj": (KV_WIDTH, inputs),
        "self_attn.v_proj": (KV_WIDTH, inputs),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (SIZES["intermediate_size"], HIDDEN),
        "mlp.up_proj": (SIZES["intermediate_size"], HIDDEN),
        "mlp.down_proj": (HIDDEN, SIZES["intermediate_size"]),
    }
    return {
        **{f"{prefix}{name}.weight": torch.randn(shape) * 0.02 for name, shape in shapes.items()},
        f"{prefix}post_attention_layernorm.weight": torch.ones(HIDDEN),
    }


def eagle(text: Continued) -> tuple[Mapping, dict[str, torch.Tensor]]:
    """Configuration and tensors of an EAGLE head."""
    inputs = torch.cat((text.following, text.hidden), dim=-1)
    fc = fitted(inputs, text.rows[text.wanted()])
    return LAYER, {"fc.weight": fc, **attention_and_mlp("layers.0.")}


def eagle3(text: Continued) -> tuple[Mapping, dict[str, torch.Tensor]]:
    """Configuration and tensors of an EAGLE-3 head, which reads three layers' inputs."""
    ones = {
        name: torch.ones(HIDDEN)
        for name in ("midlayer.input_layernorm", "midlayer.hidden_norm", "norm")
    }
    return {**LAYER, "draft_vocab_size": VOCABULARY}, {
        "fc.weight": fitted(text.layers, text.rows[text.wanted()]),
        "lm_head.weight": text.rows,
        **{f"{name}.weight": weight for name, weight in ones.items()},
        **attention_and_mlp("midlayer.", 2 * HIDDEN),
    }


def medusa(text: Continued) -> tuple[Mapping, dict[str, torch.Tensor]]:
    """Configuration and tensors of three Medusa heads; they have no attention."""
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": HIDDEN,
        "vocab_size": VOCABULARY,
        "medusa_num_heads": 3,
        "medusa_num_layers": 1,
    }
    tensors = {}
    for head in range(3):
        known = text.wanted(head) >= 0
        chosen = torch.nn.functional.one_hot(text.wanted(head)[known], VOCABULARY)
        tensors[f"{head}.0.linear.weight"] = torch.zeros(HIDDEN, HIDDEN)
        tensors[f"{head}.1.weight"] = fitted(text.hidden[known], chosen)
    return config, tensors


def dflash() -> tuple[Mapping, dict[str, torch.Tensor]]:
    """Configuration and tensors of a random DFlash head, which proposes a block in one pass.

    It reads what goes into the model's first two layers, and shares its embeddings and output.
    """
    torch.manual_seed(0)
    block = {"target_layer_ids": [0, 1], "mask_token_id": 3}
    config = {
        **LAYER,
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "dflash_config": block,
    }
    norms = {
        **dict.fromkeys(("hidden_norm", "norm", "layers.0.input_layernorm"), HIDDEN),
        **dict.fromkeys(("layers.0.self_attn.q_norm", "layers.0.self_attn.k_norm"), HEAD_DIM),
    }
    return config, {
        "fc.weight": torch.randn(HIDDEN, 2 * HIDDEN) * 0.1,
        **{f"{name}.weight": torch.ones(size) for name, size in norms.items()},
        **attention_and_mlp("layers.0."),
    }


def dspark() -> tuple[Mapping, dict[str, torch.Tensor]]:
    """As ``dflash``, with a head that makes each token of a block depend on the one before."""
    config, tensors = dflash()
    rank = 16
    markov = {
        "markov_head.markov_w1.weight": torch.randn(VOCABULARY, rank) * 0.1,
        "markov_head.markov_w2.weight": torch.randn(VOCABULARY, rank) * 0.1,
    }
    config = {**config, "architectures": ["Qwen3DSparkModel"], "markov_rank": rank}
    return config, {**tensors, **markov}


def save_head(directory: Path, config: Mapping, tensors: dict[str, torch.Tensor]) -> str:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(
        {name: x.contiguous() for name, x in tensors.items()}, directory / "model.safetensors"
    )
    return str(directory)


def add_mtp_layer(model: Path) -> None:
    """Give an ERNIE 4.5 model, in place, a layer that predicts one token more; random."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    file = model / "model.safetensors"
    norms = ("mtp_emb_norm.0", "mtp_hidden_norm.0", "mtp_block.0.input_layernorm")
    layer = {
        **attention_and_mlp("mtp_block.0."),
        **{f"{name}.weight": torch.ones(HIDDEN) for name in norms},
        "mtp_linear_proj.0.weight": torch.randn(HIDDEN, 2 * HIDDEN) * 0.1,
    }
    added = {f"model.{name}": weight for name, weight in layer.items()}
    save_file({**load_file(file), **added}, file, metadata={"format": "pt"})
