"""What all tests share: no network, fixed seeds, a device, a reason for each skipped GPU test."""

import os

# Before any Hugging Face library is imported: a test that reaches for the network is wrong.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, where kernels are decorated
    os.environ.pop("SENSEFLOW_KERNELS", None)  # a pytest-xdist worker inherits what its parent set below
from senseflow_kernels import _launch

if not torch.cuda.is_available():
    os.environ["SENSEFLOW_KERNELS"] = "torch"  # for subprocesses: a whole training in the interpreter would take hours

# Shared machines make deadlines flaky; the same examples everywhere make a failure repeatable.
settings.register_profile("senseflow", deadline=None, derandomize=True)
settings.load_profile("senseflow")

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each, subprocesses included
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A bare `pytest` runs a file per core where pytest-xdist is installed: 260 s instead of 488 s on 2 cores.

    `-n 0` is one process. So is whatever names files or other marks (`slow` tests time out or count processes), and so
    is a machine with a GPU, which the tests would share.
    """
    o = config.option
    fast_suite = config.args_source == config.ArgsSource.TESTPATHS and o.markexpr == "not slow"
    one_process = "PYTEST_XDIST_WORKER" in os.environ or o.usepdb or torch.cuda.is_available()
    if fast_suite and not one_process and getattr(o, "numprocesses", 0) is None:
        o.numprocesses, o.dist = min(CORES, 8), "loadfile"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where torch sees no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason=f"no GPU: torch {torch.__version__} sees no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _torch_path(request: pytest.FixtureRequest):
    """Without a GPU the interpreter runs the kernels in tests/ops alone."""
    if torch.cuda.is_available() or request.path.parent.name == "ops":
        yield
    else:
        with _launch.torch_path():
            yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same global random state for every test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def selected(request: pytest.FixtureRequest):
    """selected("name", ...): the values these parameters have, together, in the module's tests that are run, each once.
    What is costly for each of them is then made for no others. One name gives plain values, more give tuples."""

    def values(*names: str) -> list:
        here = [item for item in request.session.items if item.path == request.path]
        params = [
            item.callspec.params for item in here if isinstance(item, pytest.Function) and hasattr(item, "callspec")
        ]
        found = [tuple(p[name] for name in names) for p in params if all(name in p for name in names)]
        return list(dict.fromkeys(f[0] if len(names) == 1 else f for f in found))

    return values


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
