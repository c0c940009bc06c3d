"""What data/loader.py promises: every block once per epoch, in one order however many processes share it."""

import json

import numpy as np
import pytest
import torch
from conftest import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st

from data import loader, prepare


@pytest.fixture
def tokens():
    return np.arange(1000, dtype="<u2")


def test_every_block_comes_once_per_epoch_and_in_a_new_order(tokens):
    blocks = loader.Blocks(tokens, block_size=16, seed=0)
    orders, phases = set(), set()
    for epoch in range(3):
        ids, targets = blocks.batch(epoch, blocks.per_epoch)
        assert ids.shape == targets.shape == (blocks.per_epoch, 16)
        assert torch.equal(ids[:, 1:], targets[:, :-1]) and torch.equal(targets, ids + 1)
        starts = sorted(ids[:, 0].tolist())
        assert [b - a for a, b in zip(starts, starts[1:])] == [16] * (blocks.per_epoch - 1)
        orders.add(tuple((ids[:, 0] // 16).tolist()))
        phases.add(starts[0])
    assert len(orders) == 3
    assert len(phases) > 1


def test_the_order_of_blocks_depends_on_the_seed(tokens):
    first, second, again = (loader.Blocks(tokens, 16, seed).batch(0, 40)[0] for seed in (1, 2, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first[:, 0] // 16, second[:, 0] // 16)


def test_the_order_does_not_depend_on_the_size_of_a_batch(tokens):
    blocks = loader.Blocks(tokens, block_size=16, seed=3)
    whole = blocks.batch(0, 100)
    for k in range(2):  # ids, targets
        pieces = torch.cat([blocks.batch(step, 10)[k] for step in range(10)])
        assert torch.equal(whole[k], pieces)


def test_a_text_that_is_too_short_for_a_block_is_refused(tokens):
    assert loader.Blocks(tokens, block_size=500, seed=0).batch(0, 1)[0].shape == (1, 500)
    with pytest.raises(ValueError, match="1,000 tokens for training are too few for blocks of 501"):
        loader.Blocks(tokens, block_size=501, seed=0)


@pytest.mark.parametrize("world", [2, 3, 6])
def test_processes_take_disjoint_parts_of_the_same_batch(tokens, world):
    blocks = loader.Blocks(tokens, block_size=16, seed=3)
    for step in (0, 1, 5):  # blocks 60 to 71: the last one reaches into the next epoch
        whole = blocks.batch(step, 12)[0].tolist()
        parts = [blocks.batch(step, 12, rank, world)[0].tolist() for rank in range(world)]
        assert sorted(row for part in parts for row in part) == sorted(whole)
        assert {len(part) for part in parts} == {12 // world}
    assert 60 < blocks.per_epoch < 72


@settings(deadline=None, max_examples=50)
@given(n=st.integers(2, 200), block_size=st.integers(1, 20), world=st.integers(1, 3), batch=st.integers(1, 5))
def test_validation_batches_predict_every_token_once(n, block_size, world, batch):
    tokens, predicted, n_rows = np.arange(n, dtype="<u2"), [], []
    for rank in range(world):
        n_rows.append(0)
        for ids, targets in loader.validation_batches(tokens, block_size, None, batch, rank, world):
            assert ids.shape == targets.shape == (len(ids), block_size) and len(ids) <= batch
            real = targets != loader.IGNORED
            assert real.any(1).all()  # no row without a target
            assert torch.equal(ids[real] + 1, targets[real])
            predicted += targets[real].tolist()
            n_rows[-1] += len(ids)
    assert sorted(predicted) == list(range(1, n))
    assert max(n_rows) - min(n_rows) <= 1  # the work is shared evenly


@pytest.mark.parametrize("world", [1, 2, 5])
def test_a_shorter_validation_takes_blocks_from_all_over_the_text(tokens, world):
    starts = []
    for rank in range(world):
        for ids, _ in loader.validation_batches(tokens, 10, 4, rank=rank, world=world):
            starts += ids[:, 0].tolist()
    assert sorted(starts) == [0, 330, 660, 990]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepared data; the folder under data/ is removed at once."""
    text = tmp_path_factory.mktemp("text") / "a.txt"
    text.write_text("".join(f"{WORDS}line {i} of the text\n" for i in range(200)), encoding="utf-8")
    made = prepare.prepare([str(text)], name="test-loader", vocab_size=320)
    return prepare.shutil.move(made, tmp_path_factory.mktemp("data") / "test-loader")


def test_damaged_data_is_named(folder):
    raw = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(raw[:-1])
    with pytest.raises(ValueError, match="train.bin has .* bytes, not .*: prepare it again"):
        loader.load_data(folder)
    (folder / "train.bin").unlink()
    with pytest.raises(ValueError, match="train.bin has .* bytes, not .*: prepare it again"):
        loader.load_data(folder)
    (folder / "train.bin").write_bytes(raw)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"tokenizer": "another"}))
    with pytest.raises(ValueError, match="is not the tokenizer that made the data"):
        loader.load_data(folder)
    (folder / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k != "fingerprint"}))
    with pytest.raises(ValueError, match="of an older version: prepare it again"):
        loader.load_data(folder)
    (folder / "meta.json").write_text(json.dumps(meta))
    assert loader.load_data(folder).name == "test-loader"
