"""The programs of examples/, briefly."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not beside the tests", allow_module_level=True)


def run(name: str, *options: str | Path, status: int = 0) -> str:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, EXAMPLES / name, *options]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The file of a model after three updates, and what its training printed."""
    file = tmp_path_factory.mktemp("model") / "model.pt"
    return file, run("character_model.py", "--steps", "3", "--device", "cpu", "--output", file)


def test_the_character_model_learns(trained):
    first, last = (float(loss) for loss in re.findall(r"([\d.]+) nats a character", trained[1]))
    assert last < first < 5  # log(103), of an even guess, is 4.6


def test_decoding_writes_texts_that_differ_and_begin_with_the_prompt(trained):
    output = run("decode.py", trained[0], "--prompt", "def ", "--steps", "20", "--texts", "2", "--device", "cpu")
    texts = output.removesuffix("\n").split("\n----\n")
    assert len(set(texts)) == 2
    assert all(text.startswith("def ") and len(text) == 24 for text in texts)


def test_decoding_refuses_a_character_that_the_model_does_not_know(trained):
    assert "--prompt must be made of" in run("decode.py", trained[0], "--prompt", "\N{SNOWMAN}", status=2)


def test_the_recurrent_policy_learns_to_remember():
    output = run("recurrent_policy.py", "--steps", "150", "--device", "cpu")
    assert float(re.findall(r"mean reward ([\d.]+)", output)[-1]) > 0.5  # a policy that forgets has a guess's 0.25
