"""``python -m hvdlm.dataset``: check, show, import and export folders of HDF5 shards."""
