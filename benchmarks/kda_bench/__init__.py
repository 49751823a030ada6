"""What the benchmarks share: cases, contenders, the float64 yardstick, timing and reports."""
