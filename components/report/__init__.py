"""report: the run record → the page of the run, also after a failure."""
