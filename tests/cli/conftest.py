import pytest

from recalkv_vllm.cli import main
from tests.tiny_models import make_model, own_cache, tiny, tiny_models, tokenizer

__all__ = ["fails", "make_model", "own_cache", "tiny", "tiny_models", "tokenizer"]


@pytest.fixture
def fails(capsys, caplog):
    """``fails(*args)``: the one line that a command ends with."""

    def run(*args) -> str:
        try:
            status = main([*map(str, args)])
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        assert status == 2
        assert captured.out == ""
        lines = [line for line in captured.err.splitlines() if line.startswith("recalkv: error: ")]
        assert len(lines) == 1
        assert captured.err.rstrip().splitlines()[-1] == lines[0]
        assert "Traceback" not in captured.err
        return lines[0]

    return run
