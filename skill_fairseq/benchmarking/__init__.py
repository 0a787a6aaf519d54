"""What `skill-bench` measures: training steps, inference, clustering, data loading."""
