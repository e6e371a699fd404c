import pytest

from tests.e2e.conftest import compressed, half, make_small, model, small, small_prompts
from tests.reliability.figures import FIGURES
from tests.tiny_models import make_model, own_cache, tiny, tiny_models, tokenizer

__all__ = ["compressed", "half", "make_model", "make_small", "model", "own_cache", "small",
           "small_prompts", "tiny", "tiny_models", "tokenizer"]  # fmt: skip


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that tests counted."""
    if FIGURES:
        terminalreporter.section("reliability figures")
        width = max(map(len, FIGURES))
        for name, amount in FIGURES.items():
            terminalreporter.write_line(f"{name:{width}}  {amount:,.10g}")
