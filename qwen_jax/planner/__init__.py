"""Plans for machines that are not here: what fits, what moves, and what limits the speed."""
