"""Golden values of DeepSeek-V4's and HY-V4's own modules: forward, head and every gradient.

The same modules run live where torch and transformers are installed (`pip install -e .[hf]`).
"""

import pytest
from support.golden_values import check_deepseek_v4, check_head, check_hy_v4, load


@pytest.mark.parametrize("n", [2, 4, 8])
def test_deepseek_v4_hyper_connection(n):
    check_deepseek_v4(load(f"deepseek_v4_n{n}"), n)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_deepseek_v4_head(n):
    check_head(load(f"deepseek_v4_head_n{n}"), n)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_hy_v4_hyper_connection(n):
    check_hy_v4(load(f"hy_v4_n{n}"), n)
