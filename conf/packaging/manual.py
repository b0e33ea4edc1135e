#!/usr/bin/env python3
"""Makes the manual as HTML: manual.py DIRECTORY

mdbook makes HTML of the pages in conf/manual alone. The manual also links to files elsewhere in this tree: examples,
dashboards, the changelog. So this lays out a book in which each linked file is a page too, below the page that links
to it, with its links rewritten; then it runs mdbook. A file that is no Markdown becomes a page with its text.

The summary of the manual is conf/manual/SUMMARY.md, the settings of the book are in conf/manual/book.toml.
"""

import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
MANUAL = "conf/manual"
PICTURES = (".png", ".svg", ".webp")
LANGUAGES = {".rs": "rust", ".yaml": "yaml", ".json": "json", ".toml": "toml"}

# Code is matched first, so that a link inside of it is left alone.
CODE_OR_LINK = re.compile(r"^```.*?^```|`[^`\n]*`|(\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s#]+)(#[^)\s]*)?\)", re.M | re.S)
CHAPTER = re.compile(r"^(?P<indent> *)(?P<bullet>- )?\[(?P<title>[^\]]+)\]\((?P<path>[^)]+)\)$")


def in_book(path):
    """Where a file of the tree is in the book."""
    if path == f"{MANUAL}/SUMMARY.md":
        return "index.md"
    if path.startswith(MANUAL + "/"):
        return path[len(MANUAL) + 1 :]
    directory, name = posixpath.split(path)
    if name == "README.md":
        return posixpath.join(directory, "index.md")
    return path if path.endswith((".md", *PICTURES)) else path + ".md"


class Book:
    def __init__(self, source):
        self.source = source
        # The summary is no page of HTML: it is at the side of each.
        self.laid = {f"{MANUAL}/SUMMARY.md"}

    def lay(self, path):
        """Lays out a page. Gives the files that it links to, as (path, text of the link)."""
        self.laid.add(path)
        file = TREE / path
        place = self.source / in_book(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(PICTURES):
            shutil.copyfile(file, place)
            return []
        text = file.read_text()
        if not path.endswith(".md"):
            fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
            place.write_text(f"# {path}\n\n{fence}{LANGUAGES.get(file.suffix, 'text')}\n{text}{fence}\n")
            return []
        links = []

        def rewrite(found):
            label, target, anchor = found.groups()
            if target is None or re.match(r"[a-z]+:", target):
                return found[0]
            linked = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
            if not (TREE / linked).is_file():
                sys.exit(f"manual.py: {path} links to {target}, which is not a file of this tree")
            links.append((linked, label.strip("[]`")))
            relative = posixpath.relpath(in_book(linked), posixpath.dirname(in_book(path)) or ".")
            return f"{label}({relative}{anchor or ''})"

        place.write_text(CODE_OR_LINK.sub(rewrite, text))
        return links

    def lay_linked(self, links, indent):
        """Lays out the files that a page links to, unless they are in the book. Gives their lines of the summary."""
        lines = []
        for path, label in links:
            if path in self.laid:
                continue
            below = self.lay(path)
            if not path.endswith(PICTURES):
                lines.append(f"{indent}- [{label}]({in_book(path)})")
            lines += self.lay_linked(below, indent + "  ")
        return lines


def main(output):
    mdbook = subprocess.check_output([TREE / "conf/packaging/install-tools.sh", "--directory", "manual"], text=True)
    with tempfile.TemporaryDirectory() as work:
        book = Book(Path(work) / "pages")
        for settings in ("book.toml", "book.css"):
            shutil.copyfile(TREE / MANUAL / settings, Path(work) / settings)
        summary = [CHAPTER.match(line) or line for line in (TREE / MANUAL / "SUMMARY.md").read_text().splitlines()]
        chapters = [line for line in summary if not isinstance(line, str)]
        # All pages of the summary before what they link to: a page of the manual has its place there.
        links = {chapter: book.lay(f"{MANUAL}/{chapter['path']}") for chapter in chapters}
        lines = []
        for line in summary:
            if isinstance(line, str):
                lines.append(line)
                continue
            lines.append(line[0])
            below = book.lay_linked(links[line], line["indent"] + "  ")
            if below and not line["bullet"]:
                sys.exit(f"manual.py: {line['path']} cannot have pages below it; link to {below[0].strip()} elsewhere")
            lines += below
        (book.source / "SUMMARY.md").write_text("\n".join(lines) + "\n")
        command = [Path(mdbook.strip()) / "bin/mdbook", "build", "--dest-dir", output, work]
        subprocess.run(command, env={**os.environ, "MDBOOK_BOOK__SRC": "pages"}, check=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: manual.py DIRECTORY")
    main(Path(sys.argv[1]).resolve())
