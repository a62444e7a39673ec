"""Options and fixtures every test shares. Tests need no download and no file outside the clone.

Real configs, templates and the real tokenizer sharpen some tests; `--shared-data DIR` (or the
environment variable QWEN_JAX_SHARED_DATA) says where they are, and those tests skip without it.
"""

import gc
import logging
import os
import pathlib

# Eight virtual CPU devices, so that every mesh shape of eight can be tested. This must be in the
# environment before JAX starts its backend.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests' time is the compiler's: most programs run once, on tiny shapes, so LLVM's optimisations
# (40 % of a compilation) do not pay here.
for _flag, _value in (
    ("--xla_force_host_platform_device_count", 8),
    ("--xla_backend_optimization_level", 0),
):
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402  (it may import JAX plugins)

# Linux gives a process 65,530 memory maps, and each compiled program takes some of them: in one
# process for all tests LLVM would abort for want of one.
_MANY_MAPS = 20_000
# The files that take longest begin: whoever is given one last works on when all others are done.
_LONGEST = ("test_notebooks.py", "test_demo.py", "test_demo_everywhere.py", "test_job_led.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in _LONGEST)


@pytest.fixture(scope="module", autouse=True)
def _programs_are_dropped_in_time():
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MANY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def process_as_before(monkeypatch):
    """What a command sets for its process is undone."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.98")
    log = logging.getLogger("qwen_jax")
    handlers, level = list(log.handlers), log.level
    yield
    log.handlers[:], log.level = handlers, level
    jax.config.update("jax_enable_compilation_cache", True)


def pytest_addoption(parser):
    parser.addoption(
        "--shared-data",
        default=os.environ.get("QWEN_JAX_SHARED_DATA"),
        help="directory with real configs, chat templates, tensor names and the tokenizer",
    )
    parser.addoption(
        "--all-strategies",
        action="store_true",
        help="test_strategy_matrix: every strategy on every mesh of eight, not a sample",
    )


@pytest.fixture(scope="session")
def shared_data(request) -> pathlib.Path:
    """The directory of real model files, or a skip that says how to provide it."""
    where = request.config.getoption("--shared-data")
    if not where:
        pytest.skip("needs real model files: pass --shared-data DIR or set QWEN_JAX_SHARED_DATA")
    path = pathlib.Path(where)
    if not (path / "tokenizer" / "tokenizer.json").is_file():
        raise pytest.UsageError(f"--shared-data {path}: no tokenizer/tokenizer.json there")
    return path
