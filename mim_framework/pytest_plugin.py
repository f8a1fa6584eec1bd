"""What pytest loads where MIM Framework is installed: failures inside the contract show the values compared.

Imports neither torch nor the contract itself, as it is loaded in every test session of the environment.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("mim_framework.testing.contract", "mim_framework.testing.runs")
