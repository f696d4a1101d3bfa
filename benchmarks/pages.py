"""Generated text in pages that people write."""

from __future__ import annotations

from collections.abc import Mapping


def fill(page: str, sections: Mapping[str, str]) -> str:
    """The page with the text between `<!-- name -->` and `<!-- end name -->` replaced."""
    for name, text in sections.items():
        start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        before, found, rest = page.partition(start)
        if found:
            page = f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}"
    return page
