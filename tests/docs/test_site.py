"""``make docs``: the site builds without a warning, with the pages that lie outside ``docs/``."""

import subprocess
import sys

from tests.docs.pages import ROOT


def test_builds_without_a_warning(tmp_path):
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    home, examples = ((site / name).read_text() for name in ("index.html", "examples/index.html"))
    assert 'href="guide/compressing/"' in home
    assert 'href="#openai_clientpy"' in examples
    assert 'id="openai_clientpy"' in examples
    assert "preemption" in (site / "search" / "search_index.json").read_text()
