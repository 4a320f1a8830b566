"""The boxes of the DAG as functions: published files in, published files out. Each is idempotent."""
