"""Takes into the site what lies outside of docs/: README.md as its home page, the record of results with its pictures,
scripts and examples, each as a page. Links are those that work in the repository; here they are turned into the site's.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
RESULTS = "benchmarks/results"
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
RECORDINGS = "tests/golden/README.md"
PICTURES = (".gif", ".png")


def on_files(files, config):
    """Adds files to those of docs/."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    for path in sorted((ROOT / RESULTS).iterdir()):
        if path.name == "README.md" or path.suffix in PICTURES:
            files.append(File.generated(config, f"{RESULTS}/{path.name}", abs_src_path=str(path)))
    for name in (*PAGES, RECORDINGS):
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    of_recordings = [ROOT / "tests/golden" / name for name in ("record.py", "old_runs.sh")]
    for path in [*ROOT.glob("*.py"), *ROOT.glob("examples/*.diff"), *ROOT.glob("examples/*.py"), *of_recordings]:
        files.append(File.generated(config, f"source/{path.stem}.md", content=source_page(path)))
    return files


def source_page(path):
    """A script or a diff as a page, with a heading in place of each of its banners."""
    parts = re.split(r"(?m)^# -{20,} (.+)\n", path.read_text())
    page = f"---\nsearch:\n  exclude: true\n---\n\n# {path.name}\n"
    for heading, code in zip(["", *parts[1::2]], parts[::2], strict=True):
        if heading:
            page += f"\n## {heading}\n"
        page += f"\n```{path.suffix[1:].replace('py', 'python')}\n{code.strip()}\n```\n"
    return page


def on_page_markdown(markdown, page, config, files):
    """Turns links of the repository into the site's."""
    if page.file.src_uri.startswith(RESULTS):
        return markdown.replace("](../../docs/", "](../../")
    if page.file.src_uri.startswith("source/"):
        return markdown
    if page.file.src_uri == RECORDINGS:
        return re.sub(r"\]\((\w+)\.(?:py|sh)\)", r"](../../source/\1.md)", markdown)
    markdown = re.sub(r"\]\((?:\.\./)?(?:examples/)?(\w+)\.(?:py|diff)\)", r"](source/\1.md)", markdown)
    if page.file.src_uri in ("index.md", *PAGES):
        return markdown.replace("](docs/", "](").replace("](README.md", "](index.md")
    return markdown.replace("](../README.md", "](index.md").replace("](../", "](")
