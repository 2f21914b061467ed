"""Benchmarks: each compares things that run alternately in one process, so that noise hits both."""
