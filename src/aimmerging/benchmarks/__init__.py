"""Task streams: the generated `skills` sequence, which needs nothing from outside, and the published benchmarks."""
