"""The two packages, and csrc/ built by CMake where there is a compiler; everything else is in pyproject.toml.

SENSEFLOW_BUILD_EXT: 0 for a pure wheel, 1 to make a failed build an error; by default the wheel is then pure, with the
reason said. CXX, CUDACXX, SENSEFLOW_CUDA (ON, OFF), SENSEFLOW_CUDA_ARCHITECTURES, SENSEFLOW_TORCH_INCLUDE reach CMake.
Nothing here imports torch or looks at the machine's GPU.
"""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
PACKAGE = "senseflow_kernels"
WANTED = os.environ.get("SENSEFLOW_BUILD_EXT", "auto")
if WANTED not in ("auto", "0", "1"):
    raise SystemExit(f"SENSEFLOW_BUILD_EXT = {WANTED!r}: allowed is 0, 1 or auto")


def reason_against() -> str | None:
    """Why csrc/ cannot be built here; None where it can be tried."""
    compiler = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    if WANTED == "0":
        return "SENSEFLOW_BUILD_EXT=0"
    if os.name != "posix":
        return "it is built on Linux and macOS alone"
    if not any(map(shutil.which, compiler)):
        return f"no C++ compiler: none of {', '.join(compiler)} is on PATH"
    return None if shutil.which("cmake") else "no cmake on PATH"


def torch_include() -> str:
    """The headers of the torch this is installed beside, found by its folder: an isolated build cannot import it."""
    given = os.environ.get("SENSEFLOW_TORCH_INCLUDE")
    found = Path(sysconfig.get_path("platlib"), "torch", "include")
    # 2.11's own: what csrc/torch_ops.cpp needs.
    if given is None and (found / "torch/csrc/stable/device_struct.h").exists():
        return str(found)
    return given or ""


class CMakeBuild(build_ext):
    """Puts the libraries beside the package's modules: in build_lib, or in the source tree of an editable install."""

    def run(self) -> None:
        inplace = self.inplace or self.editable_mode
        package = ROOT / "kernels" / PACKAGE if inplace else Path(self.build_lib).absolute() / PACKAGE
        for stale in package.glob("libsenseflow_csrc*.so"):
            stale.unlink()
        try:
            try:
                self.cmake(package, os.environ.get("SENSEFLOW_CUDA", "AUTO"))
            except subprocess.CalledProcessError:
                if "SENSEFLOW_CUDA" in os.environ:
                    raise
                print("csrc: the build failed with CUDA and torch's operators; now the CPU library alone")
                self.cmake(package, "OFF", "-DSENSEFLOW_TORCH_INCLUDE=")
        except (OSError, subprocess.CalledProcessError) as error:
            if WANTED == "1":
                raise SystemExit(f"csrc: the build failed, and SENSEFLOW_BUILD_EXT=1: {error}") from None
            print(f"csrc: not built, torch's own operations run in its place: {error}")

    def cmake(self, package: Path, cuda: str, *more: str) -> None:
        build = Path(self.build_temp).absolute() / "csrc"
        shutil.rmtree(build, ignore_errors=True)  # its cache may name a cmake or a compiler that is gone
        build.mkdir(parents=True)
        options = [f"-DSENSEFLOW_CUDA={cuda}", f"-DSENSEFLOW_TORCH_INCLUDE={torch_include()}", "-DSENSEFLOW_TESTS=OFF"]
        if architectures := os.environ.get("SENSEFLOW_CUDA_ARCHITECTURES"):
            options.append(f"-DSENSEFLOW_CUDA_ARCHITECTURES={architectures}")
        if shutil.which("ninja"):
            options.append("-GNinja")
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *options, *more], check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count())], check=True)
        subprocess.run(["cmake", "--install", str(build), "--prefix", str(package)], check=True)

    def get_outputs(self) -> list[str]:
        built = Path(self.build_lib, PACKAGE).glob("libsenseflow_csrc*.so")
        return [] if self.editable_mode else [str(path) for path in built]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


class PlatformWheel(bdist_wheel):
    """py3-none-PLATFORM: plain C inside, for any Python and torch. py3-none-any where nothing was built."""

    def get_tag(self) -> tuple[str, str, str]:
        built = any(Path(self.bdist_dir).rglob("libsenseflow_csrc*.so"))
        return "py3", "none", super().get_tag()[2] if built else "any"


why_not = reason_against()
if why_not and WANTED == "1":
    raise SystemExit(f"csrc: cannot be built, and SENSEFLOW_BUILD_EXT=1: {why_not}")
if why_not:
    print(f"csrc: not built, torch's own operations run in its place: {why_not}")

setup(
    # kernels/ is a source root like src/: what is installed is the package inside it.
    packages=find_packages(include=["senseflow", "senseflow.*"]) + find_packages("kernels"),
    package_dir={PACKAGE: f"kernels/{PACKAGE}"},
    package_data={"senseflow": ["assets/**/*"]},
    ext_modules=[] if why_not else [Extension(f"{PACKAGE}.csrc", [])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
