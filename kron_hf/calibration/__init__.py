"""Conversion of a trained model by data: fitted layers, with shapes and ranks chosen for each. Plain PyTorch."""
