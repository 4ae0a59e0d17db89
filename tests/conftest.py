import signal

import pytest
import torch

# Test processes run side by side, and one thread is the fastest for networks of this size anyway.
torch.set_num_threads(1)
# tests stop runs by it, also where pytest itself is under nohup, which ignores it
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def fresh_torch():
    """The same random numbers for each test; what `train` and tests change in torch is undone."""
    torch.manual_seed(0)
    yield
    torch.set_flush_denormal(False)  # hypothesis refuses to work without denormal numbers
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)


def pytest_collection_modifyitems(items):
    """The longest first, so that no process is left alone with one of them at the end."""
    items.sort(key=lambda item: "test_learning" not in item.nodeid)
