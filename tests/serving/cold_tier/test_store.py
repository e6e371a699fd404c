"""Files of chunks: read back as they were, or known to be damaged."""

import numpy as np
import pytest

from recalkv_vllm.serving.cold_tier import store as store_module
from recalkv_vllm.serving.cold_tier.chunk_file import HEADER_BYTES
from recalkv_vllm.serving.cold_tier.store import ColdStore
from tests.serving.cold_tier.chunks import correlated, layout

SIZE = layout().size
#: Chunks that a predictor is fitted to in these tests.
FITTED = 64


@pytest.fixture(autouse=True)
def _little_to_fit(monkeypatch):
    monkeypatch.setattr(store_module, "FIT_TOKENS", FITTED * layout().tokens)


def paths(folder, count, name="chunk"):
    return [folder / f"{name}-{i}.bin" for i in range(count)]


@pytest.fixture
def fitted(tmp_path):
    """A store with a predictor."""
    store = ColdStore(tmp_path, layout(), SIZE)
    store.store(paths(tmp_path, FITTED, "sample"), correlated(FITTED, seed=1))
    return store


def test_chunks_come_back_before_and_after_the_predictor(tmp_path):
    store = ColdStore(tmp_path, layout(), SIZE)
    chunks, where = correlated(FITTED + 3, seed=1), paths(tmp_path, FITTED + 3)
    sizes = []
    for i in range(0, len(chunks), 3):
        store.store(where[i : i + 3], chunks[i : i + 3])
        found, wrong = store.load(where[: i + 3])
        assert wrong is None
        assert (found == chunks[: i + 3]).all()
        sizes.append(where[0].stat().st_size)
    assert len([*tmp_path.glob("predictor-*.npz")]) == 1
    # What the predictor was fitted to was written again.
    assert sizes[-1] < sizes[0] / 1.3


def test_an_engine_reads_what_another_wrote(fitted, tmp_path):
    chunks, where = correlated(2, seed=2), paths(tmp_path, 2)
    written = fitted.store(where, chunks)
    another = ColdStore(tmp_path, layout(), SIZE)
    assert (another.load(where)[0] == chunks).all()
    assert another.store(paths(tmp_path, 2, "again"), chunks) == written


def test_what_no_codec_makes_smaller_is_stored_as_it_is(fitted, tmp_path):
    noise = np.random.default_rng(3).integers(256, size=(2, SIZE), dtype=np.uint8)
    where = paths(tmp_path, 2)
    for store in fitted, ColdStore(tmp_path, None, SIZE):
        store.store(where, noise)
        assert [path.stat().st_size for path in where] == [SIZE + HEADER_BYTES + 4] * 2
        assert (store.load(where)[0] == noise).all()


@pytest.mark.parametrize("predicted", [True, False])
def test_damage_is_found(fitted, tmp_path, predicted):
    store = fitted if predicted else ColdStore(tmp_path, None, SIZE)
    chunks, where = correlated(3, seed=4), paths(tmp_path, 3)
    store.store(where, chunks)
    whole = where[1].read_bytes()
    generator = np.random.default_rng(5)
    at = {*range(HEADER_BYTES + 4), len(whole) - 1, *generator.integers(len(whole), size=40)}
    damaged = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in at]
    cut = [whole[:size] for size in (0, 1, HEADER_BYTES, HEADER_BYTES + 4, len(whole) - 1)]
    for contents in (*damaged, *cut, whole + b"\0"):
        where[1].write_bytes(contents)
        found, wrong = store.load(where)
        assert str(where[1]) in wrong
        assert "\n" not in wrong
        # Chunks in front of it are served.
        assert (found == chunks[:1]).all()


def test_a_missing_file_is_a_miss(fitted, tmp_path):
    found, wrong = fitted.load(paths(tmp_path, 1, "none"))
    assert len(found) == 0
    assert "none-0.bin" in wrong


def test_latents_of_another_checkpoint_are_not_served(fitted, tmp_path):
    where = paths(tmp_path, 1)
    fitted.store(where, correlated(1, seed=6))
    others = layout(bands=(((64, 4), (32, 6)),) * 3)
    for another in ColdStore(tmp_path, others, SIZE), ColdStore(tmp_path, layout(), SIZE, "f"):
        found, wrong = another.load(where)
        assert len(found) == 0
        assert "expected latents of this checkpoint" in wrong


def test_a_damaged_predictor_serves_nothing_and_is_replaced(fitted, tmp_path):
    where = paths(tmp_path, 1)
    fitted.store(where, correlated(1, seed=7))
    (file,) = tmp_path.glob("predictor-*.npz")
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 4
    file.write_bytes(contents)
    another = ColdStore(tmp_path, layout(), SIZE)
    assert len(another.load(where)[0]) == 0
    another.store(paths(tmp_path, FITTED), correlated(FITTED, seed=8))
    again, wrong = another.load(paths(tmp_path, FITTED))
    assert wrong is None
    assert (again == correlated(FITTED, seed=8)).all()
