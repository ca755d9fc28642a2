"""train: data set + base model → LoRA adapter and its curves."""
