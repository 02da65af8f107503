import random

from tests.hosting.protocol.fuzz import mutations

SEEDS = [b"\x82\xa1a\x01\xa1b\x02", bytes(range(200)), b""]


def test_the_same_seed_gives_the_same_frames():
    assert list(mutations(SEEDS, random.Random(1), 500)) == list(mutations(SEEDS, random.Random(1), 500))


def test_frames_differ_and_most_are_damaged():
    frames = list(mutations(SEEDS, random.Random(2), 2000))
    assert len(frames) == 2000
    assert len(set(frames)) > 1000
    assert sum(frame in SEEDS[:2] for frame in frames) < 100


def test_long_frames_stay_in_proportion():
    assert max(map(len, mutations([bytes(1000)], random.Random(3), 2000))) < 40_000
