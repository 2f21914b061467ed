"""TEXT FILES -> SHARDS: inputs, a plan of tasks, workers that encode them, shards."""
