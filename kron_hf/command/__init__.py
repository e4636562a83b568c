"""What the commands `kron-hf train` and `kron-hf compress` share. Needs the extra `demo`."""
