"""Tables of a run: their schemas, how columns become records, what a step's rows amount to."""
