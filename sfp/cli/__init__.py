"""The command `sfp`."""
