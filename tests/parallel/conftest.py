"""What several processes made of small models, once for all tests of a worker."""

from __future__ import annotations

import pytest
from spread_cases import Results, run_all


@pytest.fixture(scope="session")
def spread_results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_all(tmp_path_factory.mktemp("spread"))
