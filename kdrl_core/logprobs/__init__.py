"""Logprobs of given tokens under a model, a slice of the vocabulary at a time."""
