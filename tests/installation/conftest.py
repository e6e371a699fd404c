from tests.tiny_models import make_model, own_cache, tiny, tiny_models, tokenizer

__all__ = ["make_model", "own_cache", "tiny", "tiny_models", "tokenizer"]
