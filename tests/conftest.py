import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: tiny models on few cores otherwise spin in OpenMP
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a network

import pytest
import torch


@pytest.fixture
def figures(record_property):
    """Takes what a test counted; the end of the run shows it."""
    return lambda text: record_property("figures", text)


def pytest_terminal_summary(terminalreporter):
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    for report in reports:
        for name, text in getattr(report, "user_properties", ()):
            if name == "figures" and report.when == "call":
                terminalreporter.write_line(f"{report.nodeid}: {text}")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def without_onednn(monkeypatch):
    """The cost model as on processors where torch's own products are the fastest."""
    from kron_hf.ops import cost, gemm

    choices = (cost.forward_path, cost.backward_path)
    monkeypatch.setattr(gemm, "_faster", lambda: False)
    for choice in choices:
        choice.cache_clear()
    yield
    for choice in choices:
        choice.cache_clear()


@pytest.fixture
def restored_tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
