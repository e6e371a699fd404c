"""Results in the model card: each once, the latest, and nothing else in the card changes."""

import pytest

from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.evaluation.report import add_to_card

PERPLEXITY = {
    "metric": "ppl", "engine": "vllm", "dataset": "test.txt", "tokens": 100, "seq_len": 64,
    "perplexity": 12.5, "nll": 2.5257,
}  # fmt: skip
PASSKEY = {
    "metric": "passkey", "engine": "vllm", "score": 0.5, "prompts": 4,
    "rows": [{"length": 512}, {"length": 1024}],
}  # fmt: skip
RULER = {**PASSKEY, "metric": "ruler", "base_score": 0.75}
AGREEMENT = {
    "metric": "agreement", "engine": "transformers", "base": "models/base", "dataset": "test.txt",
    "tokens": 100, "seq_len": 64, "top1": 0.9, "kl": 0.02, "nll": 2.6, "base_nll": 2.5,
}  # fmt: skip
BEFORE, AFTER = "# name\n\nText.\n\n", "## How it was made\n\nTable.\n"
LINE = "- perplexity (100 tokens of test.txt, windows of 64, vllm): "


def test_results_stand_before_how_it_was_made(tmp_path):
    card = tmp_path / "README.md"
    card.write_text(BEFORE + AFTER)
    for result in (PERPLEXITY, PASSKEY, RULER, AGREEMENT):
        add_to_card(tmp_path, result)
    measured = card.read_text().removeprefix(BEFORE + "## Measured\n\n").removesuffix(AFTER)
    assert measured == (
        f"{LINE}12.5000 (nll 2.52570)\n"
        "- pass keys (512, 1024 tokens, vllm): 50.0% found, 4 prompts\n"
        "- RULER (512, 1024 tokens, vllm): 50.0% (base: 75.0%) found, 4 prompts\n"
        "- agreement with base (100 tokens of test.txt, windows of 64, transformers): the same "
        "most likely token at 90.00%; KL divergence 0.02000; nll 2.60000 against 2.50000\n\n"
    )


def test_a_later_result_takes_the_earlier_ones_place(tmp_path):
    card = tmp_path / "README.md"
    card.write_text(BEFORE + AFTER)
    add_to_card(tmp_path, PERPLEXITY)
    add_to_card(tmp_path, {**PERPLEXITY, "engine": "transformers"})
    add_to_card(tmp_path, {**PERPLEXITY, "perplexity": 11.0})
    text = card.read_text()
    assert text.count("perplexity") == 2
    assert f"{LINE}11.0000" in text
    assert "12.5000" in text
    assert text.count("## Measured") == 1


@pytest.mark.parametrize("text", [None, "# another readme\n"])
def test_no_card(tmp_path, text):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    with pytest.raises(InputError, match="expected the model card of a compressed checkpoint"):
        add_to_card(tmp_path, PERPLEXITY)
