"""What lives as long as a run: checkpoints, ledger, metrics, validation, and how it stops."""
