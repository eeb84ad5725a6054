"""Two packages in one distribution; kernels/ is a source root and never a package (tests/test_kernels_name.py)."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["senseflow", "senseflow.*"]), *find_packages("kernels")],
    package_dir={"senseflow_kernels": "kernels/senseflow_kernels"},
    package_data={"senseflow": ["assets/**/*"]},
)
