"""Side-by-side measurements: each prints a table of medians and ratios."""
