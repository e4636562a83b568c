"""Examples and experiments of kron_hf; not part of the installed package."""
