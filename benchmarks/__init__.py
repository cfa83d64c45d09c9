"""What hessopt costs beside its peers: `python -m benchmarks kernels`."""
