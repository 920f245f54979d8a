"""The documents: their links lead somewhere, their example runs, their figures are generated."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
pytestmark = pytest.mark.source


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
    assert [t for t in targets if not (path.parent / t).exists()] == []


def test_example_of_the_readme_runs() -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert code is not None
    names: dict[str, object] = {}
    exec(code[1], names)
    assert list(names["h"].shape) == [1, 32, 2048, 512]  # type: ignore[attr-defined]


def test_figures_of_the_readme_come_from_the_generated_page() -> None:
    readme = (ROOT / "README.md").read_text()
    block = readme.split("<!-- ladder")[1].split("<!-- /ladder -->")[0]
    rows = [line for line in block.splitlines() if line.startswith("|")]
    generated = (ROOT / "docs" / "ladder.md").read_text().splitlines()
    assert len(rows) > 10
    assert [row for row in rows if row not in generated] == []
