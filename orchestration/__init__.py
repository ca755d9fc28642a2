"""What drives a pipeline: the command line, local runs, the KFP client, images. It knows a run's files, never a stage's inside."""
