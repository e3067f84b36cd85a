"""Studies: the same steps for every combination of some settings, then one table and one plot."""
