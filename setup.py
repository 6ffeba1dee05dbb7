"""Which packages there are; pyproject.toml says everything else.

They are found, but for one: the folder `configs` is installed as `sfp.configs`.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sfp", "sfp.*"]), "sfp.configs"],
    package_dir={"sfp.configs": "configs"},
)
