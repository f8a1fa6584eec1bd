"""Ranks in the tests of plugins."""

from __future__ import annotations

import pytest

from mim_framework.testing import run_ranks


def test_a_failing_rank_is_reported_with_its_traceback():
    def rank_main(rank: int):
        raise ValueError(f"no luck on {rank}")

    with pytest.raises(RuntimeError, match="no luck on 0"):
        run_ranks(rank_main)
