"""Pages of the site that are written elsewhere: README, changelog, results, tutorial.

A hook of MkDocs. It takes each from where it stands, so that nothing is kept twice,
and turns links that leave docs/ into links between pages.
"""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"
# Where a file of the repository stands in the site.
ELSEWHERE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
ELSEWHERE |= {
    f"{RESULTS}/{path.name}": f"results/{path.name}"
    for path in sorted((ROOT / RESULTS).iterdir())
}
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)]*)?\))")


def place_in_site(source):
    """The place in the site of a file of the repository, `None` for other files."""
    if source in ELSEWHERE:
        return ELSEWHERE[source]
    if not source.startswith("docs/"):
        return None
    return source.removeprefix("docs/").replace(".ipynb", ".md")


def with_links_of_the_site(text, source):
    """The text of a file of the repository, with its links as links of the site.

    Those to files that have no page are left to MkDocs, which says so.
    """
    page = place_in_site(source)

    def moved(found):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[2]))
        place = place_in_site(target)
        if place is None:
            return found[0]
        return found[1] + posixpath.relpath(place, posixpath.dirname(page)) + found[3]

    return LINK.sub(moved, text)


def as_markdown(notebook):
    """The cells of a notebook, its code fenced."""
    texts = []
    for cell in json.loads(notebook)["cells"]:
        text = "".join(cell["source"])
        is_code = cell["cell_type"] == "code"
        texts.append(f"```python\n{text}\n```" if is_code else text)
    return "\n\n".join(texts)


def on_files(files, config):
    """Adds the files from outside docs/."""
    for source, page in ELSEWHERE.items():
        text = with_links_of_the_site((ROOT / source).read_text("utf-8"), source)
        files.append(File.generated(config, page, content=text))
    for path in sorted((ROOT / "docs").rglob("*.ipynb")):
        place = place_in_site(path.relative_to(ROOT).as_posix())
        text = as_markdown(path.read_text("utf-8"))
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Leads links that leave docs/ to where the site has the page."""
    source = page.file.src_uri
    if source in ELSEWHERE.values():
        return markdown
    return with_links_of_the_site(markdown, f"docs/{source}")
