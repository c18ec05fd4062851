"""Our operations compute the golden values of DeepSeek-V4's and HY-V4's own modules: forward, head and every gradient.

The same modules run live where torch and transformers are installed (`pip install -e .[hf]`).
"""

import pytest
from support.golden_values import check_deepseek_v4, check_head, check_hy_v4, load
from support.thinned import thin

CHECKS = {"deepseek_v4": check_deepseek_v4, "deepseek_v4_head": check_head, "hy_v4": check_hy_v4}
CASES = [(module, n) for module in CHECKS for n in (2, 4, 8)]


@pytest.mark.parametrize(
    ("module", "n"), thin(CASES, lambda case: case[1] == {"deepseek_v4": 4, "hy_v4": 2}.get(case[0], case[1]))
)
def test_modules_are_the_golden_values(module, n):
    CHECKS[module](load(f"{module}_n{n}"), n)
