"""The datasets' files: what to download, how it is converted, and whether it is whole.

`catalogue` has an entry per dataset, `ids` what their numbers mean, `convert` writes label maps,
`check` looks into every file. `sfp data` is the command line to all of it; the datasets themselves, as
mmsegmentation reads them, are in `sfp.data.datasets`.
"""
