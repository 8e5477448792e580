"""One thread and one seed for every test; global switches of PyTorch are put back afterwards."""

import pytest
import torch
from helpers import selection
from hypothesis import settings

SEED = 20230102
# the same examples each run; the first may pay for loading a library, so none has a deadline
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_addoption(parser):
    selection.add_options(parser)


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config, items):
    selection.select(config, items)


@pytest.fixture(autouse=True)
def _fresh_state():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    yield
    torch.set_num_threads(threads)
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
