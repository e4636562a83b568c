"""Writes a model for others to run: compact files, dense models, and graphs (`torch.export`, ONNX) of the factors."""
