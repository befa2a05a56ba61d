"""A pytest plugin of `run.sh --full`: a skip for a missing package is a failure."""

from collections.abc import Generator
from typing import Any

import pytest

_REASONS = ("could not import", "No module named", "not installed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    return _refused((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    return _refused((yield))


def _refused(report: Any) -> Any:
    if report.skipped and any(reason in str(report.longrepr) for reason in _REASONS):
        report.outcome = "failed"
        report.longrepr = f"skipped for a missing package: {report.longrepr}"
    return report
