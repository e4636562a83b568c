"""Metric scripts for `evaluate.load(<path>)`, so that no metric has to come from the Hub."""

from pathlib import Path

__all__ = ["ACCURACY"]

ACCURACY = str(Path(__file__).with_name("accuracy.py"))
