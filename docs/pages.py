"""Pages that `mkdocs build` makes: the API from docstrings, the front page, notebooks as pages.

Run by mkdocs-gen-files, see mkdocs.yml.
"""

import itertools
import pathlib
import re

import mkdocs_gen_files

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "detailflow_jax"


RENAMED = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def link(match: re.Match) -> str:
    """A link of a file at the root of the repository, as the page of the site writes it."""
    text, target = match.groups()
    path = target.removeprefix("docs/").partition("#")[0]
    if "://" in target or target.startswith("#"):
        return match.group()
    if target in RENAMED or (ROOT / "docs" / path).is_file():
        return f"[{text}]({RENAMED.get(target, target.removeprefix('docs/'))})"
    return text  # a file that is no page of the site


def copy_page(source: str, page: str) -> None:
    """A Markdown file of the root as a page of the site."""
    text = re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", link, (ROOT / source).read_text())
    with mkdocs_gen_files.open(page, "w") as out:
        out.write(text)


def notebook_page(path: pathlib.Path) -> None:
    """A notebook in percent form as Markdown: its text and its code, without outputs."""
    body = path.read_text().split("# ---\n", 2)[-1]
    parts = []
    for cell in re.split(r"^# %%", body, flags=re.MULTILINE)[1:]:
        head, _, cell = cell.partition("\n")
        cell = cell.strip()
        if "[markdown]" in head:
            parts.append(re.sub(r"^# ?", "", cell, flags=re.MULTILINE))
        else:
            parts.append(f"```python\n{cell}\n```")
    with mkdocs_gen_files.open(f"notebooks/{path.stem}.md", "w") as out:
        out.write("\n\n".join(parts) + "\n")


def api_pages() -> None:
    """One page per module that has public names, and an index in the order of the rooms."""
    rows = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] in ("__main__",):
            continue
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        name = ".".join(parts)
        page = "/".join(parts[1:]) or "index"
        page = f"{page}/index" if path.name == "__init__.py" and page != "index" else page
        if page != "index":
            with mkdocs_gen_files.open(f"api/{page}.md", "w") as out:
                out.write(
                    f"# `{name}`\n\n::: {name}\n    options:\n      show_root_heading: false\n"
                )
            room = parts[1] if (PACKAGE / parts[1]).is_dir() else "at the top"
            rows.append((room, ".".join(parts[1:]), page, first_sentence(path)))
    with mkdocs_gen_files.open("api/index.md", "w") as out:
        out.write("# API\n\nMade from the docstrings, one page per module.\n")
        for room, modules in itertools.groupby(sorted(rows), key=lambda row: row[0]):
            out.write(f"\n## {room}\n\n| module | |\n|-|-|\n")
            for _, name, page, summary in modules:
                out.write(f"| [`{name}`]({page}.md) | {summary} |\n")


def first_sentence(path: pathlib.Path) -> str:
    """The first line of a module's docstring."""
    found = re.match(r'(?:r?""")(.*)', path.read_text())
    return found.group(1).rstrip('"').replace("|", "\\|") if found else ""


copy_page("README.md", "index.md")
copy_page("CONTRIBUTING.md", "contributing.md")
copy_page("CHANGELOG.md", "changelog.md")
for notebook in sorted((ROOT / "notebooks").glob("*.py")):
    notebook_page(notebook)
api_pages()
