"""From structures and targets to a potential: fit, online updates, tuning."""
