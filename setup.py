"""The two packages of this distribution; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    # kernels/ is a source root like src/: what is installed is the package inside it.
    packages=find_packages(include=["senseflow", "senseflow.*"]) + find_packages("kernels"),
    package_dir={"senseflow_kernels": "kernels/senseflow_kernels"},
    package_data={"senseflow": ["assets/**/*"]},
)
