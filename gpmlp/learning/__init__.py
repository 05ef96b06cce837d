"""Learning on the fly: oracles that label, walkers on an online model, triggers and stopping criteria, and the loop that joins them."""
