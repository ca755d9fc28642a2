"""Benchmarks: programs that print a ratio and its spread; never part of the tests."""
