"""`postern papers`: list, search and show the catalogue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from postern.cli.selection import complete_paper, print_json, wide_console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from postern.papers import Entry


def papers(
    query: Annotated[
        str,
        typer.Argument(
            help="Words to search for in titles and summaries, or a paper's name.",
            autocompletion=complete_paper,
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """List the papers, search them, or show one.

    Examples: `postern papers`, `postern papers softmax`, `postern papers soft-nms`.
    """
    from postern.papers import entries, search_entries, similar_words

    by_slug = {paper.slug: paper for paper in entries()}
    exact = query in by_slug
    found = [by_slug[query]] if exact else search_entries(query) if query else list(by_slug.values())
    if as_json:
        print_json([_as_document(paper) for paper in found])
    elif exact:
        _show(by_slug[query])
    elif found:
        _list(found, len(by_slug))
    else:
        from postern.cli.selection import nearest

        typer.echo(f"No paper matches {query!r}; {nearest(query, [*similar_words(query), *by_slug])}", err=True)
        raise typer.Exit(1)


def _status(paper: Entry) -> str:
    return "planned" if paper.is_planned else f"{len(paper.claims)} claims"


def _list(found: Sequence[Entry], total: int) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("paper", "family", "year", "status", "title"):
        table.add_column(heading, overflow="ellipsis", no_wrap=True)
    for paper in found:
        status = f"[dim]{_status(paper)}[/]" if paper.is_planned else f"[green]{_status(paper)}[/]"
        table.add_row(f"[bold]{paper.slug}[/]", paper.family, str(paper.date.year), status, paper.title)
    console = wide_console()
    console.print(table)
    written = sum(not paper.is_planned for paper in found)
    console.print(f"\n{len(found)} of {total} papers, {written} of them with claims to check.", highlight=False)


def _show(paper: Entry) -> None:
    lines = [f"# {paper.title}", ""]
    facts = [str(paper.date), f"family `{paper.family}`"]
    facts += [f"arXiv {paper.arxiv}"] if paper.arxiv else []
    facts += [f"{paper.authors} authors"] if paper.authors else []
    facts += [f"code {paper.code}"] if paper.code else []
    lines += [" · ".join(facts), "", paper.summary, "", "## The paper reports", ""]
    lines += [f"- {line}" for line in paper.reported]
    if paper.is_planned:
        lines += ["", "Planned: it has no claims to check yet."]
    else:
        lines += ["", f"## Claims: `postern check {paper.slug}`", ""]
        lines += [f"- `{claim.name}` {claim.statement}" for claim in paper.claims.values()]
        for heading, entries in (
            ("Implementation details that matter", paper.details),
            ("Differences from the paper", paper.differences),
        ):
            lines += ["", f"## {heading}", "", *(f"- {entry}" for entry in entries)]
        lines += ["", "## Example", "", "```python", paper.example.strip(), "```"]
    Console().print(Markdown("\n".join(lines)))


def _as_document(paper: Entry) -> dict[str, object]:
    return {
        "paper": paper.slug,
        "title": paper.title,
        "date": paper.date.isoformat(),
        "arxiv": paper.arxiv,
        "authors": paper.authors,
        "family": paper.family,
        "summary": paper.summary,
        "reported": list(paper.reported),
        "components": list(paper.components),
        "code": paper.code,
        "status": "planned" if paper.is_planned else "written",
        "claims": {claim.name: claim.statement for claim in paper.claims.values()},
    }
