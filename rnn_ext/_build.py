"""Whether the compiled _C suits this Python and this torch: told in words, before the loader fails or, worse, succeeds.

The build leaves a record beside _C, under the same name but for ``.json``, of the torch that _C was compiled for.
setup.py reads :func:`abi` from this file, before there is a package to import.
"""

import json
import platform
import re
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path


def abi(torch_version: str) -> str:
    """What versions of torch share that can load what was compiled for one of them.

    2.14.0 and 2.14.1 share "2.14": PyTorch changes classes and signatures of C++ from one minor release to the next,
    and only mends faults between them. Nightly and source builds (2.15.0.dev20261101, 2.15.0a0+git1234567) are taken
    from anywhere in between: each is its own.
    """
    release = re.match(r"(\d+\.\d+)\.\d+(\+|$)", torch_version)
    return release[1] if release else torch_version


def check_build(folder: Path, torch_version: str, torch_cuda: str | None) -> None:
    """Checks that _C in the package's folder was built for this Python and for the torch that is given.

    Args:
        folder: where the package lies.
        torch_version: torch.__version__.
        torch_cuda: torch.version.cuda. Where CUDA kernels were built, its major version must be theirs; without them
            CPU and CUDA builds of one torch serve alike.

    Raises:
        ImportError: that says what was found, what is needed, and how to get it.
    """
    in_sources = (folder.parent / "setup.py").is_file()
    install = "python -m pip install --no-build-isolation "
    install += f"-e {folder.parent}" if in_sources else "--no-deps . in the folder of its sources"

    spec = PathFinder.find_spec("rnn_ext._C", [str(folder)])
    if spec is None or spec.origin is None:
        others = ", ".join(sorted(path.name for path in folder.glob("_C*.so")))
        problem = f"{folder} has {others or 'no compiled _C'}, and Python {platform.python_version()} needs"
        problem += f" _C{EXTENSION_SUFFIXES[0]}"
        if in_sources:
            raise ImportError(
                f"{problem}. These are rnn_ext's sources, which Python takes before an installed rnn_ext where they "
                f"lie in the current folder or on PYTHONPATH: run it in another folder, or build here: {install}"
            )
        raise ImportError(f"{problem}: reinstall rnn_ext with this Python: {install}")

    record = Path(spec.origin).resolve().with_suffix(".json")  # a strict editable installation has links to _C alone
    if not record.is_file():  # as in what a bundler copied: only the loader can tell
        return
    built = json.loads(record.read_text())
    if abi(built["torch"]) != abi(torch_version):
        raise ImportError(
            f"rnn_ext was built for torch {built['torch']}, found {torch_version}: reinstall rnn_ext ({install}), or "
            "that torch"
        )
    if built["cuda"] and (torch_cuda or "").split(".")[0] != built["cuda"].split(".")[0]:
        found = f"is built for CUDA {torch_cuda}" if torch_cuda else "is a CPU build"
        raise ImportError(
            f"rnn_ext was built for torch {built['torch']} with CUDA {built['cuda']}, and the torch found, "
            f"{torch_version}, {found}: reinstall rnn_ext ({install}), or that torch"
        )
