"""Tables of a run: their schemas, columns as records, and a stage's metrics."""
