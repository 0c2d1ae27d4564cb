"""The parts of `benchmarks.bench_quality`, which measures what methods learn."""
