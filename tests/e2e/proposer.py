"""A proposer of the user's own for vLLM's ``custom_class``; ``engine.py`` runs in this folder."""


class LastToken:
    """Proposes that a token comes again and again."""

    def __init__(self, vllm_config):
        self._count = vllm_config.speculative_config.num_speculative_tokens

    def propose(self, sampled_token_ids, *_, **__):
        return [ids[-1:] * self._count for ids in sampled_token_ids]

    def load_model(self, *_):
        """vLLM's runner for CPUs calls it without asking whether it is there."""
