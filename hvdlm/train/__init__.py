"""The training command: `__main__` starts and ends it, `session` sets it up, `loop` is the loop."""
