"""CPU tests never see a GPU, so that they are the same tests on every machine; failures are shown at once."""

import os
from collections.abc import Generator, Iterator

import pytest

from sat_train.collector import collector_off_in_imports
from tests.longest_first import sort_by_file, table_of


@pytest.hookimpl(trylast=True)  # the terminal's reporter exists by then
def pytest_configure(config: pytest.Config) -> None:
    """Hides CUDA from this process and all it starts, unless only the GPU tests were asked for."""
    wanted = [str(word).rstrip("/") for word in config.args]
    if config.option.markexpr != "gpu" and not all("tests/gpu" in word for word in wanted):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None:
        config.pluginmanager.register(ShowFailuresAtOnce(reporter))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keeps the garbage collector away from what the test files import."""
    with collector_off_in_imports():
        return (yield)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sorts files by their length where workers share them."""
    if hasattr(config, "workerinput"):
        sort_by_file(items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the seconds of each long file, where durations are asked for."""
    if config.option.durations is not None:
        reports = [report for group in terminalreporter.stats.values() for report in group]
        timed = [report for report in reports if isinstance(report, pytest.TestReport)]
        terminalreporter.section("seconds by file")
        terminalreporter.write_line("\n".join(table_of(timed)))


class ShowFailuresAtOnce:
    """Prints a failure when it happens: a run that is cut off by a time limit has then said what it knew."""

    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self._reporter = reporter

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._reporter.write_line(f"\n{report.nodeid} ({report.when}, {report.duration:.0f} s)")
            self._reporter.write_line(str(report.longrepr)[-3000:])


@pytest.fixture(autouse=True)
def _no_real_time_priority() -> Iterator[None]:
    """A test that leaves this process at real-time priority starves the machine of all others and itself."""
    yield
    policy = os.sched_getscheduler(0)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    assert policy == os.SCHED_OTHER, "the test, or a library in it, made this process real-time"
