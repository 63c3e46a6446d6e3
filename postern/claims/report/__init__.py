"""The report of a run: a static site that needs no network and no server."""

from postern.claims.report.site import write_report

__all__ = ["write_report"]
