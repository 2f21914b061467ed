"""The machines around a run: what doctor looks at before one is trusted with it."""
