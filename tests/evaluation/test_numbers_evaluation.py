"""Scores of a benchmark, their standard error and the bits of gold answers, by hand."""

import math

import pytest

from mhc_jax.evaluation.run import summarise


def test_a_benchmark_is_the_mean_of_its_items():
    scores, bits, sizes = (1.0, 0.0, 0.0, 1.0, 1.0), (8.0, 4.0, 6.0, 2.0, None), (2, 4, 1, 3, None)
    samples = [
        {
            "benchmark": "piqa",
            "task": "piqa",
            "score": score,
            "gold_bits": b,
            "gold_bytes": size,
            "truncated": score == 0,
        }
        for score, b, size in zip(scores, bits, sizes, strict=True)
    ]
    found = summarise(samples, {"piqa": 0})["piqa"]
    assert found["score"] == pytest.approx(3 / 5)
    deviation = math.sqrt((3 * 0.4**2 + 2 * 0.6**2) / 4)
    assert found["stderr"] == pytest.approx(deviation / math.sqrt(5))
    assert found["gold_bits_per_byte"] == pytest.approx(20 / 10)
    assert (found["items"], found["truncated"]) == (5, 2)
