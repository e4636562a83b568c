"""`kron-hf inspect`: a saved model on one page that needs no network, no script and no other file."""
