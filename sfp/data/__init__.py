"""Pictures and datasets: which files count, how they are read, and where benchmarks come from.

`images` reads pictures and `listing` finds them. `benchmarks` has a row per benchmark, `ids` what the
numbers in its label maps mean, `convert` and `conversions` write label maps, `check` looks into every
file: `sfp data` is the command line to all of it. `datasets` are the benchmarks as mmsegmentation reads
them.
"""
