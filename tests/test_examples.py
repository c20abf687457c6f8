"""The programs of examples/, briefly."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize("name", ["adding_problem", "tagger", "context_integration"])
def test_both_networks_learn_the_same(name, tmp_path):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "figure.png"
    output = run(f"{name}.py", "--steps", "12", "--device", "cpu", "--output", figure)
    difference = float(re.search(r"the loss curves, rnn_ext next to nn.RNN: ([\d.e+-]+);", output)[1])
    assert difference < 1e-4 * max(float(loss) for loss in re.findall(r"loss ([\d.]+) to", output))
    assert "to a mean loss of" in output
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def example(monkeypatch):
    """Imports one of the programs, which import each other as scripts in one folder do."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_tags_tell_the_brackets_on_either_side(example):
    tagger = example("tagger")
    words, tags, lengths = tagger.make_batch("cpu", torch.Generator().manual_seed(0))
    assert words.shape == tags.shape == (int(lengths.max()), tagger.BATCH)
    for sentence, tagged, length in zip(words.T.tolist(), tags.T.tolist(), lengths.tolist(), strict=True):
        for t, tag in enumerate(tagged):
            before = [word for word in sentence[: t + 1] if word < tagger.KINDS]
            after = [word for word in sentence[t:] if word < tagger.KINDS]
            kinds = (before or [0])[-1], (after or [0])[0]
            assert tag == (tagger.KINDS * kinds[0] + kinds[1] if t < length else tagger.IGNORED)


def test_what_is_to_be_added_is_marked(example):
    adding = example("adding_problem")
    x, sums = adding.make_batch("cpu", torch.Generator().manual_seed(0))
    for row, total in zip(x.unbind(1), sums, strict=True):
        marked = row[row[:, 1] == 1, 0]
        assert len(marked) == 2
        torch.testing.assert_close(marked.sum(), total)


def test_a_loss_is_reached_where_the_mean_of_some_steps_is(example):
    side_by_side = example("side_by_side")
    trainer = side_by_side.Trainer(torch.nn.Linear(1, 1), 0.1, lambda *_: None)
    trainer.losses = [3.0] * 10 + [1.0] * 20
    trainer.seconds = [0.5] * 30
    assert trainer.seconds_to(3.0) == 5.0
    assert trainer.seconds_to(1.0) == 10.0
