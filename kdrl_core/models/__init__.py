"""Models and tokenizers on disk: found, checked, prepared, loaded."""
