"""How drawn pictures are scored: a `judge` that never saw the model, tasks with the truth at hand, and their scores."""
