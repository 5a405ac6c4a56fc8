"""Products of a few rows with a matrix, and what stands around them in a decode step."""
