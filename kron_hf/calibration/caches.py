"""Outputs of the last finished block, so that a pass need not begin at the first."""
