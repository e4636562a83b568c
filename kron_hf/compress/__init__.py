"""`kron-hf compress`: from a trained image classifier or backbone to a smaller one. Needs the extra `demo`."""
