"""Batches by threads: exact coverage on any number of ranks and threads, resume, faults that are heard."""

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from senseflow.config import UserError
from senseflow.data.loader import Loader
from senseflow.data.order import Order
from senseflow.data.samples import BadSample, Skip, Skipped
from senseflow.draws import Draws

CPU = torch.device("cpu")


class Numbered:
    """Every item is its own number; `bad` ones cannot be used; loading takes a random time where slow."""

    batched = False

    def __init__(self, bad=(), slow=False):
        self.bad, self.slow, self.threads = set(bad), slow, set()

    def key(self, item):
        return f"item {item}"

    def load(self, task):
        self.threads.add(threading.current_thread().name)
        if self.slow:
            time.sleep(random.random() * 2e-3)
        if task.item in self.bad:
            raise BadSample("broken", str(task.item))
        return {"number": torch.tensor(task.item), "place": torch.tensor(task.place), "text": f"{task.caption}"}


def loader(reader, count, seed=0, **options):
    return Loader(reader, Order(count, seed, [(8, 8)]), Draws(seed), CPU, **options)


def closing(made, use):
    try:
        return use(made)
    finally:
        made.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_two_epochs_hold_every_sample_exactly_once_each(world, workers):
    """29 items in batches of 6 (no multiple of anything), read with random delays."""
    count, batch = 29, 6
    served = {}  # position -> item
    for rank in range(world):
        made = loader(Numbered(slow=workers > 0), count, rank=rank, world=world, workers=workers)
        for iteration in range(-(-2 * count // batch)):
            share = made.batch(iteration, batch)
            assert torch.equal(share.tensors["number"], share.items)
            for position, item in zip(share.samples.tolist(), share.items.tolist(), strict=True):
                assert position not in served  # no two ranks have the same
                served[position] = item
        made.close()
    for epoch in range(2):
        assert sorted(served[p] for p in range(epoch * count, (epoch + 1) * count)) == list(range(count))


def stream(made, first, last, batch):
    shares = [made.batch(i, batch) for i in range(first, last)]
    numbers = torch.cat([s.tensors["number"] for s in shares]).tolist()
    places = torch.cat([s.tensors["place"] for s in shares]).tolist()
    return list(zip(numbers, places, [t for s in shares for t in s.texts["text"]], strict=True))


@settings(max_examples=25)
@given(
    count=st.integers(1, 40), batch=st.integers(1, 8), stop=st.integers(0, 12), workers=st.sampled_from([0, 1, 3]),
    bad=st.sets(st.integers(1, 39), max_size=4), seed=st.integers(0, 9),
)  # fmt: skip
def test_a_resumed_run_goes_on_with_the_same_samples(count, batch, stop, workers, bad, seed):
    """The remaining sequence, captions and crops after a stop anywhere is that of a run that was never stopped; bad
    samples, threads and their timing change nothing."""
    reader = Numbered(bad - {0})
    whole = closing(loader(reader, count, seed, random_crop=True), lambda m: stream(m, 0, 14, batch))
    options = dict(random_crop=True, workers=workers, prefetch=2)
    resumed = closing(loader(Numbered(bad - {0}, True), count, seed, **options), lambda m: stream(m, stop, 14, batch))
    assert resumed == whole[stop * batch :]
    assert not {number for number, *_ in whole} & reader.bad


def test_replacements_leave_all_other_positions_alone():
    plain = closing(loader(Numbered(), 50), lambda m: stream(m, 0, 20, 5))
    bad = {3, 17, 31}
    made = loader(Numbered(bad), 50, workers=2)
    shares = [made.batch(i, 5) for i in range(20)]
    made.close()
    replaced = torch.cat([s.tensors["number"] for s in shares]).tolist()
    for (item, *_), other in zip(plain, replaced, strict=True):
        assert other == item or item in bad
    skips = [s for share in shares for s in share.skips]
    assert {s.key for s in skips} == {f"item {i}" for i in bad}
    assert all(s.reason == "broken" for s in skips)


def test_a_fault_in_a_thread_is_raised_where_the_batch_is_asked_for():
    class Faulty(Numbered):
        def load(self, task):
            if task.item == 7:
                raise RuntimeError("a bug of ours")
            return super().load(task)

    made = loader(Faulty(), 20, workers=3)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        for i in range(5):
            made.batch(i, 4)
    made.close()


def test_a_batch_that_does_not_come_stops_the_run():
    released = threading.Event()

    class Stuck(Numbered):
        def load(self, task):
            released.wait(20)
            return super().load(task)

    made = loader(Stuck(), 20, workers=2, timeout=0.2)
    with pytest.raises(UserError, match=r"no batch for 0.2 s \(data.timeout\)"):
        made.batch(0, 4)
    released.set()
    made.close()


STUCK = """
import sys, threading
from senseflow.config import UserError
from senseflow.data.threads import Threads, result
threads = Threads(2, "stuck")
assert threads.map(abs, [-1, -2, -3]) == [1, 2, 3]
future = threads.submit(threading.Event().wait)
try:
    result(future, 0.1, "batch")
except UserError as error:
    sys.exit(str(error))
"""


def test_a_thread_that_is_stuck_does_not_keep_the_process_from_ending():
    """In a read of a disk that is gone, say. concurrent.futures' own threads would be waited for."""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", STUCK], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        1, "no batch for 0.1 s (data.timeout): is the data's disk or network gone?\n"
    )  # fmt: skip


def test_a_timeout_of_the_readers_own_is_not_the_loops():
    class Late(Numbered):
        def load(self, task):
            raise TimeoutError("the server's")

    made = loader(Late(), 9, workers=1)
    with pytest.raises(TimeoutError, match="the server's"):
        made.batch(0, 2)
    made.close()


def test_closing_waits_for_what_is_in_progress_and_drops_the_rest():
    begun, done = threading.Event(), []

    class Slow(Numbered):
        def load(self, task):
            begun.set()
            time.sleep(0.02)
            done.append(task.item)
            return super().load(task)

    made = loader(Slow(), 400, workers=2, prefetch=2)
    made.ahead[0, 200] = made.makers.submit(made.made, 0, 200)
    begun.wait(10)
    made.close()
    assert 0 < len(done) < 100 and not any(t.is_alive() for t in (*made.pool.threads, *made.makers.threads))


def test_nothing_but_unusable_samples_ends_with_a_line():
    with pytest.raises(UserError, match="100 samples in a row cannot be used, the last one: broken"):
        loader(Numbered(range(5)), 5).batch(0, 2)


def test_batches_are_ready_ahead_and_by_the_pool():
    reader = Numbered()
    made = loader(reader, 40, workers=2, prefetch=3)
    made.batch(0, 4)
    deadline = time.monotonic() + 10
    while sum(f.done() for f in made.ahead.values()) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(number for number, _ in made.ahead) == [1, 2, 3]
    assert all(f.done() for f in made.ahead.values())
    assert {name.rpartition("_")[0] for name in reader.threads} == {"senseflow-data"}
    made.batch(7, 4)  # a jump: what was ahead of another place is dropped
    assert sorted(number for number, _ in made.ahead) == [8, 9, 10]
    made.close()


def test_skipped_counts_each_once_and_stops_over_five_percent(tmp_path):
    file = tmp_path / "skipped.jsonl"
    log = Skipped("here", 400, [Skip("shard", "unreadable tar", "", 8)])
    log.begin(file, fresh=True)
    log.add([Skip(f"k{i}", "truncated") for i in range(12)], 100)
    log.add([Skip("k3", "truncated")], 120)
    assert dict(log.counts) == {"unreadable tar": 8, "truncated": 12} and len(file.read_text().splitlines()) == 13
    again = Skipped("here", 400, [Skip("shard", "unreadable tar", "", 8)])
    with file.open("a") as f:
        f.write('{"key": "cut o')  # by a crash
    again.begin(file, fresh=False)
    assert again.counts == log.counts and len(file.read_text().splitlines()) == 13
    with pytest.raises(UserError, match=r"here: 21 of 400 samples cannot be used \(truncated: 13\), allowed is 5 %"):
        again.add([Skip("k99", "truncated")], 130)
    assert len(file.read_text().splitlines()) == 14
    large = Skipped("here", 10**6)
    large.add([Skip(f"k{i}", "truncated") for i in range(50)], 10)  # of the first 1000 at least
    with pytest.raises(UserError, match="51 of 1000"):
        large.add([Skip("one more", "truncated")], 999)


def test_a_full_disk_while_listing_is_one_line(tmp_path):
    log = Skipped("here", 400)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        log.begin(type(tmp_path)("/dev/full"), fresh=True)
        log.add([Skip("k", "truncated")], 1)


def test_a_rank_with_no_rows_is_refused():
    with pytest.raises(UserError, match=r"data.batch = 2: allowed is at least one sample a rank"):
        loader(Numbered(), 9, rank=0, world=3).batch(0, 2)
