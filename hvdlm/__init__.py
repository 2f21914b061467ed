"""Language-model pretraining on HPC clusters with Horovod, MPI and HDF5 shards."""

__version__ = "0.1.0"
