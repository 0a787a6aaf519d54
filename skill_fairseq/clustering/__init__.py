"""Groups of similar teacher layers: streaming similarity, hierarchical clustering, and a plot."""
