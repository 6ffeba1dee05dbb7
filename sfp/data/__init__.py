"""Images and datasets.

`images` reads images and `listing` finds them. `benchmarks` has a row per benchmark, `ids` the meaning
of the numbers in label maps, `convert` and `conversions` write label maps, and `check` reads every
file; the command `sfp data` uses all of these. `datasets` defines the benchmarks for mmsegmentation.
"""
