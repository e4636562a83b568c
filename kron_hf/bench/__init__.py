"""The command `kron-hf bench`: how fast the layers of a model are, predicted and measured against `nn.Linear`."""
