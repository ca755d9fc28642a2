"""serve: the /ask service that deploy rolls out."""
