"""What scripts/bench_gpu.py measures, a file each; `lab` is where they do it, `shapes` what on."""
