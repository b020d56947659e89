"""Published training runs, as jobs of the planner."""
