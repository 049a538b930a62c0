"""Tests of a GPU; anywhere else each is skipped with its reason."""

import pytest
import torch


def pytest_runtest_setup(item):
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
