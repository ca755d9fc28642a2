"""The stages of the medical QA pipeline; each folder is a container component and a command of its own."""
