"""Learning on the fly: oracles that label, a tape that forgets nothing, criteria, and the loop that joins them."""
