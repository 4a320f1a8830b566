"""The miniature world: a task, a tokenizer, a student and a teacher small enough to see the whole method on a laptop."""
