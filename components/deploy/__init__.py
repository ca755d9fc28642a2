"""deploy: model → rolled-out service, or the former one put back."""
