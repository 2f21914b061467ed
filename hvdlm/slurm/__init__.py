"""A run as jobs of a Slurm cluster: one file a subcommand."""
