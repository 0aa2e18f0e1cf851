"""The E- and M-step for a device: the search of `vdam.posterior` with a handful of launches per level.

A processor with caches wants small pieces of work, one particle and a few rotations at a time, on every core; a device wants
all particles and rotations at once. So the same levels, candidates, priors and sums exist in two orders of work: here, and in
`vdam.posterior` and `vdam.accumulate`. What both mean is defined once (`vdam.search`), and tests hold their results together.
"""
