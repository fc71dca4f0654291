"""Eight CPU devices, the same draws in every run, and no seed left to chance."""

import importlib.metadata
import os
import random
import signal
from collections.abc import Iterator

DEVICES = "--xla_force_host_platform_device_count"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):  # read once, when jax starts
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()
# A job in the background starts with SIGINT ignored, and so would the programs that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Each test compiles a program to run it once: compiling less well takes half the time.
os.environ["XLA_FLAGS"] += (
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA ends at a flag it has not got
    os.environ["XLA_FLAGS"] += (
        " --xla_cpu_use_fusion_emitters=false"  # half the time again
        " --xla_cpu_parallel_codegen_split_count=1"  # a sixth less: tests have no cores to spare
    )
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # tests run in several processes
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no TPU is asked for

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# Compiling takes as long as it takes, and a failure seen once must be seen again.
hypothesis.settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    """The plugin is there also where the package is not installed."""
    if not config.pluginmanager.has_plugin("gspmd"):
        config.pluginmanager.import_plugin("pytest_gspmd")


@pytest.fixture(autouse=True, scope="session")
def _devices() -> None:
    """All eight start before a test can ask for fewer, as a training job does."""
    import jax

    assert len(jax.devices("cpu")) == 8


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - for libraries that draw from the global state


@pytest.fixture
def rule_table() -> Iterator[None]:
    """The table of rules as it is, restored after the test."""
    from gspmd.rules.factor import RULES

    before = dict(RULES)
    yield
    for name in RULES.keys() - before.keys():
        del RULES[name]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the table of `test_harness`, to which each of its exhaustive tests adds a row."""
    reports = (x for of_one_kind in terminalreporter.stats.values() for x in of_one_kind)
    rows = [
        value
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == "harness"
    ]
    if rows:
        from harness import table

        terminalreporter.section("JAX's primitive harnesses")
        terminalreporter.write_line(table(rows))
