"""Sampling: requests → engine → verifier → published responses."""
