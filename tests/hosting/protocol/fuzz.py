"""Damaged frames: good ones with flipped bits, wrong lengths, missing, repeated and foreign pieces, and plain noise."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

_LENGTHS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 63) - 1, (1 << 64) - 1)


def mutations(seed_frames: Sequence[bytes], rng: random.Random, count: int) -> Iterator[bytes]:
    """``count`` frames, each made of a seed frame by one to four kinds of damage; the same ``rng`` gives the same frames."""
    seeds = [bytes(frame) for frame in seed_frames]
    for _ in range(count):
        frame = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
            rng.choice(_DAMAGES)(frame, rng, seeds)
        yield bytes(frame)


def _position(frame: bytearray, rng: random.Random) -> int:
    # Heads and lengths are mostly near the beginning, array data are most of the rest.
    return rng.randrange(min(len(frame), 64) if rng.random() < 0.5 else len(frame)) if frame else 0


def _piece(frame: bytes | bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(frame)) if frame else 0
    return bytes(frame[start : start + rng.choice((1, 2, 4, 16, 64, 256))])


def _flip_bits(frame: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    for _ in range(rng.randint(1, 4)):
        if frame:
            frame[_position(frame, rng)] ^= 1 << rng.randrange(8)


def _set_bytes(frame: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    at = _position(frame, rng)
    frame[at : at + 1] = rng.randbytes(1)


def _set_length(frame: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    at, width = _position(frame, rng), rng.choice((1, 2, 4, 8))
    length = rng.choice((*_LENGTHS, len(frame), len(frame) - 1, len(frame) + 1)) % (1 << 8 * width)
    frame[at : at + width] = length.to_bytes(width, rng.choice(("big", "big", "little")))


def _truncate(frame: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    del frame[_position(frame, rng) :]


def _append(frame: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    frame += rng.randbytes(rng.choice((1, 1, 2, 8, 64)))


def _remove(frame: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    at = _position(frame, rng)
    del frame[at : at + rng.choice((1, 1, 2, 4, 16))]


def _repeat(frame: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    at = _position(frame, rng)
    frame[at:at] = _piece(frame, rng) * rng.choice((1, 1, 2, 30))


def _splice(frame: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    other = rng.choice(seeds)
    if rng.random() < 0.5:
        at = _position(frame, rng)
        frame[at:at] = _piece(other, rng)
    else:
        frame[_position(frame, rng) :] = other[rng.randrange(len(other) + 1) :]


def _noise(frame: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    frame[:] = rng.randbytes(rng.choice((0, 1, 2, 5, 9, 40, 200)))


_DAMAGES: tuple[Callable[[bytearray, random.Random, Sequence[bytes]], None], ...] = (
    *(_flip_bits, _flip_bits, _set_bytes, _set_length, _set_length, _truncate, _append, _remove, _repeat, _splice, _splice),
    _noise,
)
