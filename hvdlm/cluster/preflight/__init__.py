"""Whether the nodes of a job are fit for a run: what each says of itself, and all of them together."""
