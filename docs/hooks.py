"""Lets pages link to files of the repository that are no pages: the site carries them along.

On GitHub `../benchmarks/results/x.json` is a file beside `docs/`. The site has it at
`repository/benchmarks/results/x.json`; of a folder it has the README.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_LINK = re.compile(r"(\]\()(\.\./[^)#\s]+)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs with each page before its links are checked."""
    pages = Path(config.docs_dir)
    here = pages / page.file.src_uri

    def replace(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(here.parent / link[2]))
        if target.is_relative_to(pages) or not target.exists():
            return link[0]  # mkdocs checks the first and reports the second
        if target.is_dir():
            target /= "README.md"
        name = f"repository/{target.relative_to(pages.parent).as_posix()}"
        name = name.removesuffix(".md") + (".txt" if name.endswith(".md") else "")
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(target)))
        return link[1] + os.path.relpath(pages / name, here.parent)

    return _LINK.sub(replace, markdown)
