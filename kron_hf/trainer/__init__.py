"""`KronTrainer`, and the checkpoints that it never leaves half-written.

Nothing is imported here: transformers' Trainer takes long to load, and `last_checkpoint` does not need it.
"""
