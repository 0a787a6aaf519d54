"""The report of a run or a benchmark: reading what is in its folder, pictures, one page of HTML."""
