"""Pseudorandom permutations that are evaluated per element, so that no permutation is stored in memory."""

from __future__ import annotations

import numpy as np

ROUNDS = 8


def mix(x: np.ndarray) -> np.ndarray:
    """Apply splitmix64's finalizer, a bijection of uint64 in which each input bit flips about half of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*parts: int | np.ndarray) -> np.ndarray:
    """Hash ``parts`` to uint64 keys. Arrays broadcast."""
    key = np.zeros(np.broadcast_shapes(*(np.shape(part) for part in parts)), dtype=np.uint64)
    with np.errstate(over="ignore"):  # NumPy warns about the overflow of scalars, but not of arrays
        for part in parts:
            key = mix(key + np.uint64(0x9E3779B97F4A7C15) + np.asarray(part).astype(np.uint64))
    return key


def shuffle(position: np.ndarray, length: np.ndarray | int, key: np.ndarray) -> np.ndarray:
    """Map each ``position`` with the pseudorandom permutation of range(``length``) selected by ``key``, elementwise.

    This is a Feistel network on the smallest domain with an even number of bits that contains range(``length``). Values
    outside the range are mapped again until they fall into it (cycle walking), which terminates because the network is
    a permutation.
    """
    value = np.asarray(position).astype(np.uint64)
    length, key = np.broadcast_to(length, value.shape).astype(np.uint64), np.broadcast_to(key, value.shape)
    assert (value < length).all()
    half = np.maximum(1, (np.ceil(np.log2(np.maximum(2, length.astype(np.float64)))) + 1) // 2).astype(np.uint64)
    todo = np.ones(value.shape, dtype=bool)
    while todo.any():
        value[todo] = _feistel(value[todo], half[todo], key[todo])
        todo = value >= length
    return value.astype(np.int64)


def _feistel(value: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for number in range(ROUNDS):
        left, right = right, left ^ (mix(key + mix(right + np.uint64(number + 1) * np.uint64(1 << 40))) & mask)
    return (left << half) | right
