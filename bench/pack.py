"""Packages for a GPU machine without network: `python -m bench.pack FOLDER` installs them under FOLDER/site/.

One folder a package, with what it needs beyond torch's own needs. `python -m bench.gpu` puts on the path those that the
machine has not got. Pure Python alone, for the machine's may be another version; diffusers in the version used here.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

PACKAGES = {  # name to import -> what pip installs for it
    "diffusers": (f"diffusers=={version('diffusers')}", "importlib_metadata", "zipp"),
    "hypothesis": ("hypothesis", "sortedcontainers"),  # the newest version without compiled files
    "pytest": ("pytest", "pluggy", "iniconfig", "packaging", "pygments"),
    "pytest_benchmark": ("pytest-benchmark", "py-cpuinfo"),
    "xdist": ("pytest-xdist", "execnet"),
}
PURE = ("--only-binary=:all:", "--platform", "any", "--implementation", "py", "--abi", "none")


def main(folder: Path) -> int:
    """0, or the exit code of the pip that failed."""
    for name, requirements in PACKAGES.items():
        target = folder / "site" / name
        options = ("--quiet", "--no-deps", "--no-compile", "--disable-pip-version-check", "--target", str(target))
        done = subprocess.run([sys.executable, "-m", "pip", "install", *options, *PURE, *requirements])
        if done.returncode:
            print(f"bench.pack: {', '.join(requirements)}: not packed", file=sys.stderr)
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
