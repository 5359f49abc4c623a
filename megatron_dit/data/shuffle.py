"""Permutations that are evaluated where they are asked, so that none is ever held in memory."""

from __future__ import annotations

import numpy as np

ROUNDS = 8


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 in which each bit of the input flips about half of the output (splitmix64's finalizer)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*parts: int | np.ndarray) -> np.ndarray:
    """uint64 keys that differ wherever one of ``parts`` does; arrays broadcast."""
    key = np.zeros(np.broadcast_shapes(*(np.shape(part) for part in parts)), dtype=np.uint64)
    with np.errstate(over="ignore"):  # of scalars, which arrays do not mention
        for part in parts:
            key = mix(key + np.uint64(0x9E3779B97F4A7C15) + np.asarray(part).astype(np.uint64))
    return key


def shuffle(position: np.ndarray, length: np.ndarray | int, key: np.ndarray) -> np.ndarray:
    """Images of ``position`` under the permutations of range(``length``) that ``key`` names, element by element.

    A Feistel network on the smallest domain of an even number of bits that holds ``length``; values that fall outside
    are sent through again, which ends since the network is a permutation (cycle walking).
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
