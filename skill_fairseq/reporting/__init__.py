"""Reports of runs and benchmarks: reading a folder, drawing pictures, writing one HTML page."""
