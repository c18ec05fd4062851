"""Every tolerance of the tests.  Loosening one needs a reason in the commit."""

import numpy as np

FP32_RELATIVE = 2e-6
"""float32 against the float64 oracles, relative to the largest entry of the result."""
BF16_RELATIVE = 2**-8
"""One rounding to bfloat16, whose unit in the last place is 2^-7 of 1."""
FORMS_FP32 = 5e-6
"""float32, two implementations of a chain of operations, each operation within FP32_RELATIVE of the truth."""
SPLIT_SUMS = 1e-5
"""float32 sums over channels or tokens: of products of bfloat16 pieces to order 2^-16, or whose largest entry has cancelled."""
REORDERED = 1e-6
"""float32 results of the same numbers, added up in another order."""
ANOTHER_PROGRAM = 1e-5
"""float32, two programs of one function, which XLA fuses, and so rounds, differently; 6.4e-6 was seen."""
TEN_STEPS = 1e-4
"""The same after ten optimizer steps; 1.3e-5 was seen between processors with AVX2 and with SSE4.2."""
ROUTED_STEPS = 1e-3
"""The same after ten optimizer steps with experts, whose routers turn a rounding into another choice; 2e-4 was seen."""
SHARDED_UPDATE = 2e-5
"""float32 parameters after two steps of Muon on a mesh; ten Newton-Schulz iterations enlarge a rounding."""
SLOPES = 2e-5
"""float32 gradients along a random direction, which are sums of up to 100 terms, against central differences in float64."""
AMPLIFIED = 2e-3
"""Two programs of HC with random parameters, whose gain enlarges a rounding: more than 2e-4 through 16 sub-layers was seen."""
WHOLE_GRADIENT = 1e-4
"""float32 gradients with another layout of parameters or another implementation of operations; attention differed by 9e-6."""
BF16_CHAIN = 3e-2
"""Five or six roundings to bfloat16, each by up to 2^-8 = 4e-3, in a row."""
ORACLE_GRADIENT = 1e-5
"""float32 gradients against central differences of a float64 oracle, whose own error is about 1e-8."""
FLOAT64 = 1e-13
"""Two ways to write the same float64 formula."""
DIFFERENCES = 1e-8
"""Central differences of an O(1) float64 function at a step of 1e-6, whose rounding is 1e-16 / 1e-6."""
GOLDEN = 1e-5
"""Golden values of other implementations, which themselves compute in float32."""
FLOAT64_SUMS = 1e-12
"""float64 sums of a few terms in another order."""
FLOAT64_CHAIN = 1e-10
"""The same through a projection, a root and twenty Sinkhorn iterations."""
ROUNDED = {"float32": 1e-6, "bfloat16": 2.0**-8}
"""A float64 result rounded to the dtype of the streams; of float32 an ulp is 1.2e-7, and of bfloat16 half of one this."""
STEP_ZERO = 1e-5
"""Largest |logit difference| to Pre-Norm at initialisation, float32."""


def assert_close(actual, expected, relative=FP32_RELATIVE, what="", terms=0.0):
    """max |actual - expected| <= relative * scale, and the shapes are equal.

    scale = max |expected|, or the largest of the `terms` that cancel in it, where those are larger.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    scale = max(np.abs(expected).max(initial=0.0), np.abs(terms).max(), 1e-30)
    error = np.abs(actual - expected).max(initial=0.0) / scale
    assert error <= relative, f"{what}: relative error {error:.2e} > {relative:.0e}"


def cancelling(gradients):
    """Path -> size of the terms that cancel in that gradient (`assert_close`), 0 for nearly all.

    The gradient of the share of `identity_mix` sums what nearly equal streams would exchange: of terms as large as those of its
    alpha 1e-3 was left.
    """
    shares = {path: path.replace("share_logit", "alpha") for path in gradients if path.endswith("share_logit")}
    return dict.fromkeys(gradients, 0.0) | {
        path: 0.1 * np.abs(gradients[alpha]).max() for path, alpha in shares.items()
    }


def assert_rounded(actual, expected, what=""):
    """bfloat16 numbers which were float32 until their one rounding: each is within half a unit of its own exact value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    bound = BF16_RELATIVE * np.abs(expected) + FP32_RELATIVE * np.abs(expected).max(initial=0.0)
    worst = np.max(np.abs(actual - expected) / bound, initial=0.0)
    assert worst <= 1, f"{what}: rounded more than once, an error of {worst:.2f} half units"
