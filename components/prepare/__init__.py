"""prepare: rows in any usual format → a validated, split data set and its report."""
