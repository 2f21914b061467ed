"""Training whose hosts come and go."""
