"""`kron-hf train`: trains an image classifier with Kronecker layers. Needs the extra `demo`."""
