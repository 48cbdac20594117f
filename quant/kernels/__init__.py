"""Inner loops of the solvers over one block of columns."""
