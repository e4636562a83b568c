"""`kron-hf verify`: counts again what a card claims, from the files of the model alone."""
