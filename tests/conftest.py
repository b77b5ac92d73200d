"""Puts this folder on the import path, so that every test can ``import zoo``."""

import pytest
import torch


@pytest.fixture(autouse=True)
def own_threads():
    """A config may set the number of threads for its whole process; here the next test is in it as well."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
