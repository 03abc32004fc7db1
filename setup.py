# SPDX-License-Identifier: Apache-2.0
import sys

from setuptools import find_packages, setup

PROGRAMS = ("launch", "configs")

packages = find_packages(include=["pyramid_jax*", *(f"{name}*" for name in PROGRAMS)])
folders = {}
# A wheel holds the programs inside the package, where pyramid_jax/__main__.py finds
# them: their names are too general for site-packages. An editable install does not.
if "editable_wheel" not in sys.argv:
    inside = "pyramid_jax._programs."
    folders = {f"{inside}{name}": name for name in PROGRAMS}
    packages = [inside * p.startswith(PROGRAMS) + p for p in packages]

setup(packages=packages, package_dir=folders)
