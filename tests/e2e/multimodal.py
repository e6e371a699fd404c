"""Small models of several modalities, with their processors."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    Mistral3Config,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SiglipVisionConfig,
)

from tests.e2e.architectures import EXPERTS, MIXED, SIZES, WINDOW, save_random_model
from tests.e2e.more_architectures import MORE_CONFIGS, QWEN3_5
from tests.tiny_models import VOCABULARY, train_tokenizer

#: Tokens of images are behind the vocabulary that the tokenizer learns.
END_OF_VOCABULARY = VOCABULARY
IMAGE = "[IMG]"
TEXT = {**SIZES, "vocab_size": VOCABULARY + 8}
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
QWEN_TEXT = {
    **TEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
}
QWEN_TOWER = {"depth": 2, "num_heads": 2, "intermediate_size": 64, "patch_size": 14}
NEWER_QWEN_TOWER = {
    **QWEN_TOWER,
    "hidden_size": 64,
    "out_hidden_size": 256,
    "num_position_embeddings": 16,
}
QWEN3_VL_TEXT = {
    **QWEN_TEXT,
    "head_dim": 32,
    "rope_parameters": {**QWEN_TEXT["rope_parameters"], "mrope_interleaved": True},
}
QWEN3_VL_TOWER = {**NEWER_QWEN_TOWER, "deepstack_visual_indexes": [0]}
PIXELS = {"shortest_edge": 56}
CROP = {"height": 56, "width": 56}

CONFIGS = {
    "gemma3": Gemma3Config(
        text_config=Gemma3TextConfig(
            **{**TEXT, **WINDOW, "tie_word_embeddings": True},
            head_dim=32,
            query_pre_attn_scalar=20,
            layer_types=MIXED,
        ),
        vision_config=SiglipVisionConfig(**TOWER),
        mm_tokens_per_image=4,
        boi_token_index=VOCABULARY + 1,
        eoi_token_index=VOCABULARY + 2,
        image_token_index=VOCABULARY,
    ),
    "llava": LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**TOWER, projection_dim=64),
        image_token_id=VOCABULARY,
        vision_feature_layer=-1,
    ),
    "llava-next": LlavaNextConfig(
        text_config=MistralConfig(**TEXT, **WINDOW),
        vision_config=CLIPVisionConfig(**TOWER, projection_dim=64),
        image_token_id=VOCABULARY,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
    ),
    "mistral3": Mistral3Config(
        text_config=MistralConfig(**TEXT, sliding_window=None),
        vision_config=PixtralVisionConfig(**TOWER, head_dim=32),
        tie_word_embeddings=False,
        image_token_id=VOCABULARY,
        vision_feature_layer=-1,
    ),
    "qwen2-vl": Qwen2VLConfig(
        text_config=QWEN_TEXT,
        vision_config={"depth": 2, "num_heads": 2, "embed_dim": 64, "hidden_size": 256},
        tie_word_embeddings=True,
    ),
    "qwen2.5-vl": Qwen2_5_VLConfig(
        text_config=QWEN_TEXT,
        vision_config={**QWEN_TOWER, "hidden_size": 64, "out_hidden_size": 256},
        tie_word_embeddings=False,
    ),
    "qwen3-vl": Qwen3VLConfig(
        text_config=QWEN3_VL_TEXT,
        vision_config=QWEN3_VL_TOWER,
        tie_word_embeddings=False,
    ),
    "qwen3-vl-moe": Qwen3VLMoeConfig(
        text_config={
            **QWEN3_VL_TEXT,
            **EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        },
        vision_config=QWEN3_VL_TOWER,
        tie_word_embeddings=False,
    ),
    # Layers with attention alone: see ``test_hybrid.py``.
    "qwen3.5": Qwen3_5Config(
        text_config={**QWEN3_5, **TEXT},
        vision_config=NEWER_QWEN_TOWER,
        tie_word_embeddings=False,
    ),
    "qwen3.5-moe": Qwen3_5MoeConfig(
        text_config={**MORE_CONFIGS["qwen3.5-moe-attention"].to_dict(), **TEXT},
        vision_config=NEWER_QWEN_TOWER,
        tie_word_embeddings=False,
    ),
}
#: Images of Gemma and Qwen are not served; the processor of Mistral's needs torchvision.
TEXT_ALONE = {name for name in CONFIGS if not name.startswith("llava")}


def processor(name: str):
    """As the model's directory has it; of :data:`TEXT_ALONE` the tokenizer."""
    tokenizer = train_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    if name in TEXT_ALONE:
        return tokenizer
    options = {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "image_token": IMAGE,
        "num_additional_image_tokens": 1,
    }
    if name == "llava":
        images = CLIPImageProcessor(size=PIXELS, crop_size=CROP)
        return LlavaProcessor(images, tokenizer, **options)
    pinpoints = CONFIGS[name].image_grid_pinpoints
    images = LlavaNextImageProcessor(size=PIXELS, crop_size=CROP, image_grid_pinpoints=pinpoints)
    return LlavaNextProcessor(images, tokenizer, **options)


def as_published(path: Path) -> None:
    """Rewrite a config as those of the first Qwen models are: the language model's has no part."""
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "rope_theta": rope["rope_theta"],
        "tie_word_embeddings": config["tie_word_embeddings"],
    }
    path.write_text(json.dumps({**text, **config}))


def save_multimodal_model(name: str, directory: Path) -> Path:
    """Write a model of :data:`CONFIGS` with random weights, and its processor."""
    save_random_model(CONFIGS[name], directory, auto_class=AutoModelForImageTextToText)
    # As models on the hub have them: transformers writes other forms by now.
    path = directory / "model.safetensors"
    tensors = load_file(path)
    if name.startswith("llava"):
        tower = re.compile(r"^vision_tower\.(?!vision_model\.)")
        tensors = {tower.sub("vision_tower.vision_model.", n): x for n, x in tensors.items()}
    if name == "qwen3-vl-moe":
        tensors = {n: x.mT.contiguous() if "experts" in n else x for n, x in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    if name in ("qwen2-vl", "qwen2.5-vl"):
        as_published(directory / "config.json")
    processor(name).save_pretrained(directory)
    return directory
