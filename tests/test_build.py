"""What setup.py decides before it compiles, and what the import says of a build that can't serve."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rnn_ext
from rnn_ext import _C
from rnn_ext._build import abi, check_build

ROOT = Path(__file__).parents[1]


def run(*command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    environment.pop("PYTHONPATH", None)  # the package is to be the one in the folder
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


# What the import says


@pytest.fixture
def package(tmp_path) -> Path:
    """The package as it is before anything is compiled, in a folder of no sources."""
    compiled = shutil.ignore_patterns("_C*", "__pycache__")
    return Path(shutil.copytree(Path(rnn_ext.__file__).parent, tmp_path / "rnn_ext", ignore=compiled))


def put_build(package: Path, torch: str, cuda: str | None = None) -> None:
    """A _C that no loader can load, and the record beside it."""
    (package / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    (package / f"_C{EXTENSION_SUFFIXES[0]}").with_suffix(".json").write_text(json.dumps({"torch": torch, "cuda": cuda}))


def test_the_report_run_among_the_sources_says_where_to_run_it(package):
    (package.parent / "setup.py").touch()
    done = run(sys.executable, "-m", "rnn_ext", folder=package.parent)
    assert done.returncode == 1
    assert f"{package} has no compiled _C" in done.stderr and "circular import" not in done.stderr
    assert "run it in another folder, or build here: python -m pip install --no-build-isolation -e" in done.stderr


def test_another_torch_is_told_before_the_loader_fails(package):
    put_build(package, "1.0.0")
    done = run(sys.executable, "-c", "import rnn_ext", folder=package.parent)
    assert f"rnn_ext was built for torch 1.0.0, found {torch.__version__}: reinstall rnn_ext" in done.stderr


def test_the_record_is_found_through_the_links_of_a_strict_editable_installation(package, tmp_path):
    put_build(package, "1.0.0")
    library = package / f"_C{EXTENSION_SUFFIXES[0]}"
    links = tmp_path / "links"
    links.mkdir()
    (links / library.name).symlink_to(library)
    with pytest.raises(ImportError, match=r"for torch 1\.0\.0, found 2\.14\.1"):
        check_build(links, "2.14.1", None)


def test_a_build_for_another_python_is_told(package):
    (package / "_C.cpython-38-somewhere.so").touch()
    with pytest.raises(ImportError, match=r"has _C\.cpython-38-somewhere\.so, and Python .* needs _C.*: reinstall"):
        check_build(package, "2.14.1", None)


@pytest.mark.parametrize(
    "built, cuda, found, found_cuda",
    [
        ("2.14.1+cu130", None, "2.14.0", None),
        ("2.14.0+cpu", None, "2.14.1+cu130", "13.0"),
        ("2.14.0+cu130", "13.0", "2.14.1+cu132", "13.2"),
        ("2.15.0.dev20261101+cu130", "13.0", "2.15.0.dev20261101+cu130", "13.0"),
    ],
)
def test_a_build_serves_the_releases_and_cuda_versions_of_one_abi(package, built, cuda, found, found_cuda):
    put_build(package, built, cuda)
    check_build(package, found, found_cuda)


@pytest.mark.parametrize(
    "built, cuda, found, found_cuda, message",
    [
        ("2.15.0", None, "2.14.1", None, "for torch 2.15.0, found 2.14.1: reinstall"),
        ("2.1.0", None, "2.14.1", None, "for torch 2.1.0, found 2.14.1: reinstall"),
        ("2.14.1", None, "2.14.0a0+git5c48869", None, "for torch 2.14.1, found 2.14.0a0.git5c48869: reinstall"),
        ("2.15.0.dev20261101", None, "2.15.0.dev20261102", None, "dev20261101, found 2.15.0.dev20261102: reinstall"),
        ("2.14.1+cu130", "13.0", "2.14.1+cpu", None, "with CUDA 13.0, and the torch found, 2.14.1.cpu, is a CPU build"),
        ("2.14.1+cu130", "13.0", "2.14.1+cu128", "12.8", "with CUDA 13.0, .* is built for CUDA 12.8: reinstall"),
    ],
)
def test_a_build_for_another_torch_is_refused(package, built, cuda, found, found_cuda, message):
    put_build(package, built, cuda)
    with pytest.raises(ImportError, match=message):
        check_build(package, found, found_cuda)


def test_the_extension_in_use_has_its_record():
    record = json.loads(Path(_C.__file__).with_suffix(".json").read_text())
    assert abi(record["torch"]) == abi(torch.__version__)
    assert (record["cuda"] is not None) == rnn_ext.is_cuda_built()


# What setup.py decides


@pytest.fixture
def setup_py(monkeypatch, tmp_path):
    """setup.py as a module, on a machine of no toolkits, where torch 2.14.1 is built for CUDA 13.0."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("the sources are not beside the tests")
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("RNN_EXT_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setattr(module, "TOOLKITS", [f"{tmp_path}/usr/cuda", f"{tmp_path}/usr/cuda-*"])
    set_torch(monkeypatch, module, "2.14.1+cu130", "13.0")
    return module


def set_torch(monkeypatch, module, version: str, cuda: str | None = None) -> None:
    no_gpu = SimpleNamespace(is_available=lambda: False)
    fake = SimpleNamespace(__version__=version, version=SimpleNamespace(cuda=cuda), cuda=no_gpu)
    monkeypatch.setattr(module, "torch", fake)


def make_toolkit(folder: Path, version: str) -> Path:
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(f"#!/bin/sh\necho Cuda compilation tools, release {version}, V{version}.9\n")
    (folder / "bin/nvcc").chmod(0o755)
    return folder


def test_setup_py_works_from_another_folder(setup_py, tmp_path):
    done = run(sys.executable, setup_py.__file__, "--name", folder=tmp_path, RNN_EXT_CUDA="0")
    assert done.stdout == "rnn_ext\n", done.stderr


def test_the_toolkit_of_torchs_cuda_is_found_among_others(setup_py, tmp_path, capsys):
    make_toolkit(tmp_path / "usr/cuda", "12.8")
    right = make_toolkit(tmp_path / "usr/cuda-13.2", "13.2")
    make_toolkit(tmp_path / "usr/cuda-9.0", "9.0")
    assert setup_py.choose_cuda() == right
    assert f"{tmp_path}/usr/cuda is CUDA 12.8, and torch 2.14.1+cu130 is built for CUDA 13.0" in capsys.readouterr().err


def test_a_toolkit_of_another_cuda_is_refused_where_cuda_is_demanded(setup_py, tmp_path, monkeypatch):
    make_toolkit(tmp_path / "usr/cuda", "12.8")
    monkeypatch.setenv("RNN_EXT_CUDA", "1")
    with pytest.raises(SystemExit) as error:
        setup_py.choose_cuda()
    for words in ("a toolkit of CUDA 13 ", "/usr/cuda is CUDA 12.8", "is built for CUDA 13.0", "RNN_EXT_CUDA=0 builds"):
        assert words in str(error.value)


def test_a_toolkit_of_another_cuda_gives_a_cpu_build_with_a_warning(setup_py, tmp_path, capsys):
    make_toolkit(tmp_path / "usr/cuda", "12.8")
    assert setup_py.choose_cuda() is None
    said = capsys.readouterr().err
    assert "is CUDA 12.8, and torch 2.14.1+cu130 is built for CUDA 13.0" in said
    assert "no CUDA kernels are built, as a toolkit of CUDA 13 is not found" in said


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_a_variable_that_names_no_toolkit_is_told(setup_py, tmp_path, monkeypatch, capsys, variable):
    right = make_toolkit(tmp_path / "usr/cuda", "13.0")
    monkeypatch.setenv(variable, str(tmp_path))
    assert setup_py.choose_cuda() == right
    assert f"{variable}={tmp_path} is no CUDA toolkit" in capsys.readouterr().err


def test_a_cpu_build_of_torch_asks_for_no_toolkit(setup_py, tmp_path, monkeypatch, capsys):
    make_toolkit(tmp_path / "usr/cuda", "13.0")
    set_torch(monkeypatch, setup_py, "2.14.1+cpu")
    assert setup_py.choose_cuda() is None
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RNN_EXT_CUDA", "1")
    with pytest.raises(SystemExit, match=r"torch 2\.14\.1\+cpu is a CPU build"):
        setup_py.choose_cuda()


@pytest.mark.parametrize(
    "value, archs",
    [
        *[(unset, "8.0+PTX;9.0a") for unset in (None, "", " ", "native")],
        ("8.6 9.0a", "8.6;9.0a"),
        ("12.0+PTX;", "12.0+PTX"),
        ("Ampere;Blackwell+Tegra", "Ampere;Blackwell+Tegra"),
    ],
)
def test_the_architectures_are_the_named_ones_or_the_default(setup_py, monkeypatch, value, archs):
    if value is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    assert setup_py.choose_archs() == archs


def test_what_is_no_architecture_is_refused(setup_py, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0,9.0")
    with pytest.raises(SystemExit, match=r"'8\.0,9\.0' is no architecture"):
        setup_py.choose_archs()


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_number_of_jobs_that_is_none_is_refused(setup_py, monkeypatch, value):
    monkeypatch.setenv("MAX_JOBS", value)
    with pytest.raises(SystemExit, match=f"MAX_JOBS must be a whole number from 1 up, or unset, got '{value}'"):
        setup_py.whole_number("MAX_JOBS", 1)


def test_an_old_setuptools_is_told(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py.setuptools, "__version__", "69.5.1")
    with pytest.raises(SystemExit, match=r"needs setuptools 77 or newer to be built, found 69\.5\.1"):
        setup_py.check_versions()


def test_the_versions_are_those_of_the_metadata_and_the_readme(setup_py):
    pyproject, readme = (ROOT / "pyproject.toml").read_text(), (ROOT / "README.md").read_text()
    assert pyproject.count(f"setuptools>={setup_py.SETUPTOOLS}") == pyproject.count("setuptools>") == 2
    assert readme.count(f"setuptools>={setup_py.SETUPTOOLS}") == readme.count("setuptools>") == 1
    assert "torch {}.{} to {}.{}".format(*setup_py.OLDEST_TORCH, *setup_py.NEWEST_TORCH) in readme


def test_a_torch_beyond_those_tested_is_told(setup_py, monkeypatch, capsys):
    set_torch(monkeypatch, setup_py, "2.10.0")
    with pytest.raises(SystemExit, match=r"needs torch 2\.11 to 2\.15, found 2\.10\.0"):
        setup_py.check_versions()
    set_torch(monkeypatch, setup_py, "2.16.0a0+git1234567")
    setup_py.check_versions()
    assert "torch 2.16.0a0+git1234567 is newer than" in capsys.readouterr().err


def test_a_missing_compiler_is_told(setup_py, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match=r"needs a C\+\+ compiler, and there is no no-such-compiler"):
        setup_py.check_compiler()


@pytest.mark.parametrize(
    "version, pin",
    [
        ("2.14.1+cu130", "torch==2.14.*"),
        ("2.11.0", "torch==2.11.*"),
        ("2.15.0.dev20261101+cpu", "torch==2.15.0.dev20261101"),
        ("2.14.0a0+git5c48869", "torch==2.14.0a0"),
    ],
)
def test_the_metadata_name_the_torch_of_the_build(setup_py, monkeypatch, version, pin):
    monkeypatch.chdir(ROOT)
    set_torch(monkeypatch, setup_py, version)
    assert setup_py.requirement() == pin


@pytest.fixture
def command(setup_py, tmp_path, monkeypatch):
    """setup.py's build_ext over one that compiles nothing."""

    class Command:
        def get_ext_fullpath(self, name: str) -> str:
            return str(tmp_path / "_C.here.so")

        def build_extensions(self) -> None:
            assert self.force  # as what lies there may be of another torch

        def run(self) -> None:
            self.build_extensions()

    monkeypatch.setattr(setup_py, "check_compiler", lambda: None)
    return type("build_ext", (setup_py.RecordedBuild, Command), {"record": {"torch": "2.14.1", "cuda": "13.0"}})()


def test_the_record_is_left_beside_the_extension(command, tmp_path):
    command.run()
    assert json.loads((tmp_path / "_C.here.json").read_text()) == {"torch": "2.14.1", "cuda": "13.0"}


def test_a_failing_compilation_leaves_no_record_and_ends_in_words(command, tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("g++ is too new for CUDA 13.0")

    monkeypatch.setattr(type(command).__bases__[1], "build_extensions", fail)
    with pytest.raises(SystemExit, match=r"could not be built: g\+\+ is too new for CUDA 13\.0\nRNN_EXT_CUDA=0 builds"):
        command.run()
    assert not list(tmp_path.glob("*.json"))
