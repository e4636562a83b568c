"""Fits Kronecker factors to the inputs and wanted outputs of a layer: activation-aware conversion, in plain PyTorch."""
