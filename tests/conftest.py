import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: tiny models on few cores otherwise spin in OpenMP
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a network

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
