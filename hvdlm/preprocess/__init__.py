"""The preprocessing command: `__main__` runs it, `arguments` reads options, `report` says what was made."""
