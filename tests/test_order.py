"""Which item comes when: exact coverage, buckets, replacements."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from senseflow.data.order import Order, bucket_sizes, nearest_bucket, permutation

SQUARE = [(64, 64)]


@given(count=st.integers(1, 500), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 1000))
def test_a_permutation_holds_every_item_once(count, seed, epoch):
    assert np.array_equal(np.sort(permutation(seed, epoch, count)), np.arange(count))


def test_permutations_of_seeds_and_epochs_look_independent():
    """Of 400 permutations of 50, each item is first about as often as any other; neighbours do not stay neighbours."""
    found = np.array([permutation(seed, epoch, 50) for seed in range(20) for epoch in range(20)])
    counts = np.bincount(found[:, 0], minlength=50)
    assert ((counts - 8.0) ** 2 / 8).sum() < 49 + 5 * np.sqrt(2 * 49)  # chi squared, 49 degrees, 5 deviations
    assert abs(np.mean(np.diff(found) == 1) - 1 / 50) < 5 * np.sqrt(1 / 50 / found.size)
    assert len({tuple(row) for row in found}) == 400


@given(count=st.integers(1, 60), batch=st.integers(1, 17), seed=st.integers(0, 99))
def test_every_epoch_holds_every_item_once(count, batch, seed):
    """Without buckets: positions 0 to count - 1 are the first epoch, and so on, however they fall into batches."""
    order = Order(count, seed, SQUARE)
    stream = np.concatenate([order.plan(i, batch).items for i in range(-(-2 * count // batch))])
    for epoch in range(2):
        assert np.array_equal(np.sort(stream[epoch * count : (epoch + 1) * count]), np.arange(count))
    assert np.array_equal(order.plan(1, batch).items, Order(count, seed, SQUARE).plan(1, batch).items)


@given(count=st.integers(1, 80), batch=st.integers(1, 9), seed=st.integers(0, 99), kinds=st.integers(1, 4))
def test_buckets_are_padded_with_their_own_first_items(count, batch, seed, kinds):
    buckets = np.random.default_rng(seed).integers(0, kinds, count)
    order = Order(count, seed, [(64, 64)] * kinds, buckets)
    rows = int(order.batches_per_epoch(batch))
    for epoch in range(2):
        plans = [order.plan(epoch * rows + i, batch).items for i in range(rows)]
        assert all(len(set(buckets[p])) == 1 for p in plans)
        times = np.bincount(np.concatenate(plans), minlength=count)
        for bucket in np.unique(buckets):
            mine = times[buckets == bucket]
            assert mine.sum() == -(-len(mine) // batch) * batch
            assert mine.min() >= 1 and mine.max() - mine.min() <= 1


def test_bucket_sizes_hold_the_area_and_the_aspect():
    for side, step in ((1024, 64), (512, 64), (64, 16)):
        sizes = bucket_sizes(side)
        assert (side, side) in sizes and len(sizes) > 2
        for h, w in sizes:
            assert h % step == w % step == 0 and h * w <= side * side and max(h / w, w / h) <= 2
            assert (w, h) in sizes
    sizes = bucket_sizes(1024)
    found = nearest_bucket(np.array([1000, 1920, 600, 5000]), np.array([1000, 1080, 1200, 10]), sizes)
    assert [sizes[i] for i in found] == [(1024, 1024), (768, 1344), (1408, 704), (704, 1408)]


def test_a_replacement_is_of_the_same_bucket_and_depends_on_nothing_else():
    buckets = np.array([0, 1, 0, 1, 0, 1, 1, 1])
    order = Order(8, 3, [(64, 64), (32, 96)], buckets)
    found = [order.alternative(1, position, 1) for position in range(200)]
    assert set(found) == {1, 3, 5, 6, 7}
    assert found == [Order(8, 3, [(64, 64), (32, 96)], buckets).alternative(1, p, 1) for p in range(200)]
    assert [order.alternative(1, p, 2) for p in range(200)] != found
    assert set(Order(8, 3, SQUARE).alternative(1, p, 1) for p in range(200)) == set(range(8))


def test_ten_million_items_are_permuted_without_collisions_of_the_hash():
    found = permutation(0, 0, 1_000_003)
    assert np.unique(found).size == 1_000_003


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_share_a_batch_without_overlap(world):
    rows = [range(r * 10 // world, (r + 1) * 10 // world) for r in range(world)]
    assert sorted(i for r in rows for i in r) == list(range(10))
