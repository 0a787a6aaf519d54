"""Feature files of recordings, for k-means and other programs."""
