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
def tokens(tmp_path):
    np.arange(1000, dtype="<u2").tofile(tmp_path / "train.bin")
    return loader.Tokens(tmp_path, "train", "<u2")


def test_shards_are_read_as_one_file(tmp_path):
    ids = np.arange(1000, dtype="<u2")
    for i, part in enumerate(np.split(ids, [300, 301, 700])):
        part.tofile(tmp_path / f"train_{i:03}.bin")
    tokens = loader.Tokens(tmp_path, "train", "<u2")
    assert len(tokens) == 1000
    for start, count in ((0, 1000), (299, 3), (300, 1), (650, 100), (990, 50)):
        assert tokens.read(start, count).tolist() == ids[start : start + count].tolist()


@pytest.mark.parametrize("n", [1, 2, 3, 10, 64, 1000, 4097])
def test_permute_is_a_permutation_that_changes_with_its_key(n):
    first, second = ([loader.permute(i, n, key) for i in range(n)] for key in (1, 2))
    assert sorted(first) == sorted(second) == list(range(n))
    if n > 10:
        assert first != second
        assert abs(np.corrcoef(first, range(n))[0, 1]) < 0.5


def test_every_block_comes_once_per_epoch_and_in_a_new_order(tokens):
    blocks = loader.Blocks(tokens, block_size=16, seed=0)
    epochs = []
    for epoch in range(3):
        ids, targets, counts, sources = blocks.batch(epoch * blocks.per_epoch, blocks.per_epoch)
        assert torch.equal(ids[:, 1:], targets[:, :-1])
        assert set(counts.tolist()) == {16} and set(sources.tolist()) == {0}
        starts = sorted(ids[:, 0].tolist())
        assert [b - a for a, b in zip(starts, starts[1:])] == [16] * (blocks.per_epoch - 1)
        epochs.append(ids[:, 0].tolist())
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({epoch[0] % 16 for epoch in epochs}) > 1  # cut at another phase


def test_the_order_does_not_depend_on_how_it_is_read(tokens):
    blocks = loader.Blocks(tokens, block_size=16, seed=3)
    whole = blocks.batch(0, 100)[0]
    pieces = torch.cat([blocks.batch(i, 10)[0] for i in range(0, 100, 10)])
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("world", [2, 3, 6])
def test_processes_take_disjoint_parts_of_the_same_batch(tokens, world):
    blocks = loader.Blocks(tokens, block_size=16, seed=3)
    for position in (0, 18, 60):  # the third reaches into the next epoch
        whole = blocks.batch(position, 12)[0].tolist()
        parts = [blocks.batch(position, 12, rank, world)[0].tolist() for rank in range(world)]
        assert sorted(row for part in parts for row in part) == sorted(whole)
        assert {len(part) for part in parts} == {12 // world}


def test_what_is_read_ahead_comes_in_order(tokens):
    blocks = loader.Blocks(tokens, block_size=16, seed=3)
    batches = loader.read_ahead(lambda step: blocks.batch(4 * step, 4), 10)
    for step in (10, 11, 12):
        assert all(torch.equal(a, b) for a, b in zip(next(batches), blocks.batch(4 * step, 4)))


def test_a_block_belongs_to_the_source_in_which_it_begins(tmp_path):
    np.arange(1000, dtype="<u2").tofile(tmp_path / "train.bin")
    tokens = loader.Tokens(tmp_path, "train", "<u2", [100, 0, 900])
    blocks = loader.Blocks(tokens, block_size=10, seed=0)
    ids, _, _, sources = blocks.batch(0, blocks.per_epoch)
    assert sources.tolist() == [0 if first < 100 else 2 for first in ids[:, 0].tolist()]
    for ids, targets, counts, sources in loader.validation_batches(tokens, 10, batch_size=8):
        kept = counts > 0
        assert counts.tolist() == (targets != loader.IGNORED).sum(1).tolist()
        assert (sources[kept] == 2 * (ids[kept][:, 0] >= 100)).all()


@settings(deadline=None, max_examples=50)
@given(n=st.integers(2, 200), block_size=st.integers(1, 20), world=st.integers(1, 3), batch=st.integers(1, 5))
def test_validation_batches_predict_every_token_once(n, block_size, world, batch):
    tokens = loader.Tokens.__new__(loader.Tokens)
    tokens.parts, tokens.starts, tokens.borders = [np.arange(n)], np.array([0, n]), np.array([])
    predicted, counts = [], set()
    for rank in range(world):
        batches = list(loader.validation_batches(tokens, block_size, None, batch, rank, world))
        counts.add(len(batches))
        for ids, targets, _, _ in batches:
            real = targets != loader.IGNORED
            assert torch.equal(ids[real] + 1, targets[real])
            predicted += targets[real].tolist()
    assert sorted(predicted) == list(range(1, n))
    assert len(counts) == 1  # or the processes would wait for each other forever


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
    with pytest.raises(ValueError, match="train.bin is missing or cut off"):
        loader.load_data(folder)
    (folder / "train.bin").write_bytes(raw[:-2])
    with pytest.raises(ValueError, match="train.bin has .* prepare it again"):
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
