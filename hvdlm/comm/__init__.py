"""Processes: how this one was launched, and the named collectives between all of them."""
