"""Experts of other ranks are left out: vLLM 0.32's kernel for experts on a CPU has no map of them.

For ``worker_extension_cls``: every worker imports it.
"""

from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

_apply = CPUUnquantizedExperts.apply


def apply(self, *arguments, topk_weights, topk_ids, expert_map, **others):
    if expert_map is not None:
        own = expert_map[topk_ids]
        topk_weights = topk_weights.masked_fill(own < 0, 0)
        topk_ids = own.clamp(min=0).to(topk_ids.dtype)
    return _apply(
        self,
        *arguments,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        expert_map=expert_map,
        **others,
    )


CPUUnquantizedExperts.apply = apply


class Mapped:
    """Adds nothing to a worker."""
