"""pip install in fresh environments: with compiler and nvcc, with a compiler alone, with neither; wheel and editable.

Nothing is downloaded: dependencies and the build's tools are those of the environment that runs the test.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SITE = sysconfig.get_path("purelib")
COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang")
# Made in the fresh environment: which path runs, and one step of each kind on it.
PROBE = """
import logging, torch, senseflow_kernels as sk, senseflow_kernels._ext as ext
logging.basicConfig(level=logging.INFO)
phi = [torch.ones(100_000).bfloat16(), torch.ones(7)]
sk.Lerp(phi, [torch.zeros_like(p) for p in phi], "nearest").step(0.5)
assert all((p == 0.5).all() for p in phi)
print(sk.__file__)
print("cpu:", ext.reason_against("cpu"))
print("cuda:", ext._cuda()[1])
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler: c++ is not on PATH"),
    pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake on PATH"),
]


def path_without(folder, *tools):
    """A PATH of one folder that holds links to everything on the present one but these."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for file in Path(place).iterdir() if Path(place).is_dir() else ():
            # cc-12, x86_64-linux-gnu-g++: a compiler by any of its names
            if not any(file.name == tool or file.name.endswith("-" + tool) for tool in tools):
                link = folder / file.name
                if not link.exists() and not link.is_symlink():
                    link.symlink_to(file)
    return str(folder)


def install(tmp_path, *options, **environment):
    """(venv's python, what pip said) after `pip install --no-deps` of a copy of the checkout."""
    source = tmp_path / "source"
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists() and not name.startswith(("tests/", "bench/results/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    # Beside the fresh environment, so that torch and setuptools are there and this checkout is not.
    Path(next((tmp_path / "venv").glob("lib/python*/site-packages")), "others.pth").write_text(SITE + "\n")
    env = {k: v for k, v in os.environ.items() if not k.startswith("SENSEFLOW_") and k != "PYTHONPATH"}
    env |= dict(PIP_DISABLE_PIP_VERSION_CHECK="1", **environment)
    command = [python, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", *options, str(source)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    return python, done, env


def probe(python, env, tmp_path):
    env = {k: v for k, v in env.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([python, "-c", PROBE], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def libraries(folder):
    return {p.name for p in Path(folder).glob("libsenseflow_csrc*")}


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
@pytest.mark.parametrize("tools", ["compiler and nvcc", "compiler", "neither", "BUILD_EXT=0"])
def test_pip_install(tmp_path, tools, editable):
    options, environment = ["-e"] if editable else [], {}
    if tools == "compiler and nvcc" and not shutil.which("nvcc"):
        pytest.skip("no nvcc on PATH")
    if tools == "compiler":  # CMake looks for nvcc in /usr/local/cuda too
        environment = dict(PATH=path_without(tmp_path / "bin", "nvcc"), SENSEFLOW_CUDA="OFF")
    elif tools == "neither":
        environment["PATH"] = path_without(tmp_path / "bin", "nvcc", *COMPILERS)
    elif tools == "BUILD_EXT=0":
        environment["SENSEFLOW_BUILD_EXT"] = "0"
    python, done, env = install(tmp_path, *options, **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    out, said = probe(python, env, tmp_path)
    where = tmp_path / ("source" if editable else "venv")
    assert Path(out.splitlines()[0]).is_relative_to(where)
    built = libraries(Path(out.splitlines()[0]).parent)
    if tools in ("neither", "BUILD_EXT=0"):
        assert not built and "was not built" in out and "lerp runs in torch" in said
        assert ("no C++ compiler" if tools == "neither" else "SENSEFLOW_BUILD_EXT=0") in done.stdout + done.stderr
    else:
        assert "cpu: None" in out and said.count("csrc runs on CPU tensors with") == 1
        assert ("libsenseflow_csrc_cuda.so" in built) == ("nvcc" in tools)
        # It loads without a GPU and without a driver.
        assert ("cuda: None" in out) == ("nvcc" in tools)


def test_wheel_names(tmp_path):
    """py3-none-PLATFORM with the libraries inside, py3-none-any without; neither for one Python alone."""
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    for wanted, tag in (("1", f"py3-none-{platform}"), ("0", "py3-none-any")):
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        env |= dict(SENSEFLOW_BUILD_EXT=wanted, SENSEFLOW_CUDA="OFF")
        folder = tmp_path / wanted
        ignored = shutil.ignore_patterns(".git", "runs", "build", "*.so", "tests", "*.egg-info")
        shutil.copytree(ROOT, folder, ignore=ignored)
        options = ["--no-deps", "--no-build-isolation", "-w", tmp_path / "w"]
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", *options, folder], check=True, env=env, capture_output=True
        )
        (wheel,) = (tmp_path / "w").glob("*.whl")
        assert wheel.name.endswith(tag + ".whl"), wheel.name
        inside = {Path(name).name for name in zipfile.ZipFile(wheel).namelist()}
        assert ("libsenseflow_csrc.so" in inside) == (wanted == "1") and "_ext.py" in inside
        wheel.unlink()


def test_build_ext_1_makes_a_failure_an_error(tmp_path):
    path = path_without(tmp_path / "bin", "nvcc", *COMPILERS)
    _, done, _ = install(tmp_path, SENSEFLOW_BUILD_EXT="1", PATH=path)
    assert done.returncode != 0 and "no C++ compiler" in done.stdout + done.stderr


def test_a_compiler_that_fails(tmp_path):
    """Said, and installed without csrc; with SENSEFLOW_BUILD_EXT=1 an error."""
    for wanted in ("auto", "1"):
        (tmp_path / wanted).mkdir()
        _, done, _ = install(tmp_path / wanted, SENSEFLOW_BUILD_EXT=wanted, CXX="false")
        assert (done.returncode != 0) == (wanted == "1")
        assert ("csrc: not built" if wanted == "auto" else "csrc: the build failed") in done.stdout + done.stderr


def test_ctest(tmp_path):
    subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path, "-DSENSEFLOW_CUDA=OFF"], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path], check=True, capture_output=True)
    done = subprocess.run(["ctest", "--output-on-failure"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "100% tests passed" in done.stdout, done.stdout
