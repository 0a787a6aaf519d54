"""Features of recordings in files, as k-means and other programs read them."""
