"""The miniature world: a task, a student and a teacher small enough to see the whole method on a laptop."""
