"""The examples in the docstrings of mhc_kernels run and print what they say."""

import doctest

import mhc_kernels
import pytest

PUBLIC = [name for name in mhc_kernels.__all__ if callable(getattr(mhc_kernels, name))]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_of_a_docstring_runs(name):
    test = doctest.DocTestParser().get_doctest(getattr(mhc_kernels, name).__doc__, {}, name, None, None)
    assert test.examples, "every public function has an example"
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.REPORT_NDIFF)
    failed, out = runner.run(test, out=(lines := []).append).failed, "".join(lines)
    assert failed == 0, out
