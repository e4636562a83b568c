"""`kron-hf demo`: a dense ViT and its Kronecker twin on scikit-learn's digits. Needs the extra `demo`."""
