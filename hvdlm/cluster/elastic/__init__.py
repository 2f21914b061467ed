"""The elastic driver: who takes part in a run, and the worlds that it forms one after another."""
