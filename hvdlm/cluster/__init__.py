"""The machines around a run: what doctor looks at, and what Slurm says."""
