"""Kronecker-sparse layers for Hugging Face models."""
