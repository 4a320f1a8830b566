"""Find, check, prepare and load models and tokenizers on disk."""
