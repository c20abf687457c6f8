"""README and the pages that it leads to, the issue form, the CI file: each names only what is there."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("", "docs/", "benchmarks/", "benchmarks/results/", "csrc/")
PAGES = [path for folder in FOLDERS for path in sorted(ROOT.glob(f"{folder}*.md"))]
if ROOT / "README.md" not in PAGES:
    pytest.skip("the documentation is not beside the tests", allow_module_level=True)


def anchors(page: Path) -> set[str]:
    """The page's headings as GitHub names them in links."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_reached_from_the_readme():
    reached, open_pages = set(), [ROOT / "README.md"]
    while open_pages:
        page = open_pages.pop()
        reached.add(page)
        links = re.findall(r"\]\(([^)\s#:]+\.md)", page.read_text())
        open_pages += {(page.parent / link).resolve() for link in links} - reached
    assert set(PAGES) <= reached


def test_the_readmes_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["h"].shape == (3, 20)
    assert all(parameter.grad is not None for parameter in names["cell"].parameters())
    assert type(names["model"]["cell"]) is names["rnn_ext"].RNNCell


def test_the_readmes_first_screen_says_what_no_gpu_has_run():
    """As long as no result of a GPU is committed."""
    on_a_gpu = [path for path in ROOT.glob("benchmarks/results/*/bench.json") if '"gpu": null' not in path.read_text()]
    if not on_a_gpu:
        assert "no GPU has run them yet" in "\n".join((ROOT / "README.md").read_text().splitlines()[:25])


def load(path: str) -> Any:
    yaml = pytest.importorskip("yaml")
    if not (ROOT / path).exists():
        pytest.skip(".github is not beside the tests")
    return yaml.safe_load((ROOT / path).read_text())


def test_the_ci_file_covers_what_the_readme_promises():
    jobs = load(".github/workflows/ci.yml")["jobs"]
    readme = (ROOT / "README.md").read_text()
    matrix = jobs["cpu"]["strategy"]["matrix"]
    oldest, newest = re.search(r"torch (2\.\d+) to (2\.\d+)", readme).groups()
    assert [matrix["torch"][i].rsplit(".", 1)[0] for i in (0, -1)] == [oldest, newest]
    assert matrix["python"] == [f"3.{minor}" for minor in range(10, 14)] and "Python 3.10 to 3.13" in readme
    combinations = [{"torch": t, "python": p} for t, p in itertools.product(matrix["torch"], matrix["python"])]
    assert all(excluded in combinations for excluded in matrix["exclude"])


def test_the_ci_file_calls_make_targets_that_exist():
    jobs = load(".github/workflows/ci.yml")["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    called = {target for run in runs for target in re.findall(r"^make (\w+)", run, re.MULTILINE)}
    assert {"lint", "test", "build"} <= called
    assert called <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_issue_form_asks_for_the_report():
    form = load(".github/ISSUE_TEMPLATE/bug.yml")
    assert {"name", "description", "body"} <= set(form)
    first = form["body"][0]
    assert "python -m rnn_ext" in first["attributes"]["label"] and first["validations"]["required"]
    assert len({field["id"] for field in form["body"]}) == len(form["body"])
