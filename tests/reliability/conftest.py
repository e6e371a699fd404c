import pytest

from tests.e2e.conftest import compressed, half, make_small, model, small, small_prompts
from tests.reliability.figures import FIGURES, count
from tests.tiny_models import make_model, own_cache, tiny, tiny_models, tokenizer

__all__ = ["compressed", "half", "make_model", "make_small", "model", "own_cache", "small",
           "small_prompts", "tiny", "tiny_models", "tokenizer"]  # fmt: skip


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands on what its tests counted."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = dict(FIGURES)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Add what a worker's tests counted."""
    for name, amount in getattr(node, "workeroutput", {}).get("figures", {}).items():
        count(name, amount)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that tests counted."""
    if FIGURES:
        terminalreporter.section("reliability figures")
        width = max(map(len, FIGURES))
        for name, amount in FIGURES.items():
            terminalreporter.write_line(f"{name:{width}}  {amount:,.10g}")
