"""The numerics contract, test cases and timing that tests and benchmarks share."""
