"""Runs from Python: start or resume one, and read one as pandas DataFrames. `import kdrl_core` is the door."""
