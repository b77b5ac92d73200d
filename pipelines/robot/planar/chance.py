"""Random numbers of many rows at once, each a function of its row's seed alone (SplitMix64)."""

from __future__ import annotations

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_STREAM = np.uint64(0xD1B54A32D192ED03)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def uniforms(seeds: np.ndarray, count: int, stream: int = 0) -> np.ndarray:
    """Uniform numbers in [0, 1).

    Args:
        seeds: ``[n]`` integers.
        count: numbers per seed.
        stream: another one gives unrelated numbers for the same seeds.

    Returns:
        float64 ``[n, count]``. Row i does not depend on the other rows.
    """
    streams = np.asarray([stream], np.uint64) * _STREAM + _GAMMA
    starts = _mix(np.asarray(seeds).astype(np.uint64) ^ _mix(streams))
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GAMMA
    return (_mix(starts[:, None] + steps) >> np.uint64(11)) * 2.0**-53


def permutations(seeds: np.ndarray, size: int, stream: int = 0) -> np.ndarray:
    """A random order of 0..size-1 for each seed, ``[n, size]``."""
    return np.argsort(uniforms(seeds, size, stream), axis=1, kind="stable")


def normals(seeds: np.ndarray, count: int, stream: int = 0) -> np.ndarray:
    """Standard normal numbers, float64 ``[n, count]`` (Box-Muller)."""
    radius, angle = np.split(uniforms(seeds, 2 * count, stream), 2, axis=1)
    return np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))
