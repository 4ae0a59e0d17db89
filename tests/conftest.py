import signal

import pytest
import torch

# Test processes run side by side, and one thread is the fastest for networks of this size anyway.
torch.set_num_threads(1)
# tests stop runs by it, also where pytest itself is under nohup, which ignores it
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def denormal_numbers():
    """`train` turns them off in its process, and hypothesis refuses to work without them."""
    yield
    torch.set_flush_denormal(False)


def pytest_collection_modifyitems(items):
    """The longest first, so that no process is left alone with one of them at the end."""
    items.sort(key=lambda item: "test_learning" not in item.nodeid)
