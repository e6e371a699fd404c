"""Where vLLM is made to ask us: an engine's arguments, once they have become its configuration."""

from __future__ import annotations

import functools
from typing import Any

from vllm.config import VllmConfig

from recalkv_vllm.serving.startup.announcement import announce
from recalkv_vllm.serving.startup.check import check_servable


def check_engine_config(engine_args: Any) -> bool:
    """Make ``engine_args.create_engine_config`` check what it made; once per class.

    Wraps methods because vLLM 0.32 gives plugins no place to refuse a configuration: on CPU a
    stock model under ``--attention-backend recalkv`` would silently run vLLM's own attention. Can
    go when platforms ask an out-of-tree backend too, or when vLLM validates through a hook.

    Returns:
        Whether it did not before.
    """
    create, parse = engine_args.create_engine_config, engine_args.from_cli_args.__func__
    if getattr(create, "checked_by_recalkv", False):
        return False

    @functools.wraps(parse)
    def from_cli_args(cls, args):
        made = parse(cls, args)
        # Adapters that the server loads at its start; vLLM keeps them from the engine's arguments.
        # None is no attribute: "vllm bench" takes every attribute for an argument of the engine.
        if adapters := [module.path for module in getattr(args, "lora_modules", ()) or ()]:
            made.recalkv_adapters = adapters
        return made

    @functools.wraps(create)
    def create_engine_config(self, *args, **kwargs) -> VllmConfig:
        config = create(self, *args, **kwargs)
        served = check_servable(config, getattr(self, "recalkv_adapters", ()))
        if served is not None:
            announce(config, served)
        return config

    engine_args.create_engine_config = create_engine_config
    engine_args.create_engine_config.checked_by_recalkv = True
    engine_args.from_cli_args = classmethod(from_cli_args)
    return True
