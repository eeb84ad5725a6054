"""The folder kernels/ must never hide Hugging Face's package `kernels` (see CONTRIBUTING.md)."""

import importlib
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_folder_is_a_source_root():
    """Without `__init__.py` the folder is a namespace portion: any regular package wins over it."""
    assert (ROOT / "kernels" / "senseflow_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = PathFinder.find_spec("kernels", [str(ROOT)])
    assert spec is not None
    assert spec.origin is None  # a regular package would name its __init__.py


def test_the_name_is_never_ours(monkeypatch: pytest.MonkeyPatch):
    """With the repo root first on the path, as pytest and `python -m` put it."""
    monkeypatch.syspath_prepend(str(ROOT))
    importlib.invalidate_caches()
    spec = find_spec("kernels")
    if spec is not None and spec.origin is not None:
        assert not Path(spec.origin).is_relative_to(ROOT / "kernels")


def test_hugging_face_works_from_the_repo_root():
    """transformers' models and diffusers' attention dispatch both import it when it is there."""
    for package in ("kernels", "transformers", "diffusers"):
        try:
            version(package)
        except PackageNotFoundError:
            pytest.skip(f"{package} is not installed: pip install -e '.[train,dev]'")
    code = (
        "import transformers, diffusers\n"
        "import transformers.modeling_utils, diffusers.models.attention_dispatch\n"
        "from kernels import get_kernel\n"
        "import kernels; print(kernels.__file__); print(callable(get_kernel))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    where, works = done.stdout.split()[-2:]
    assert works == "True"
    assert not Path(where).is_relative_to(ROOT / "kernels")
