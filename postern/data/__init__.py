"""Data sets: embedded, local or from the Hub, by one function, `load`."""

from postern.data._catalogue import DataSet, catalogue
from postern.data.errors import DataUnavailable, InvalidData
from postern.data.kinds import Images, Table, Text
from postern.data.loading import Location, fetch, load, locate, verify

__all__ = [
    "DataSet",
    "DataUnavailable",
    "Images",
    "InvalidData",
    "Location",
    "Table",
    "Text",
    "catalogue",
    "fetch",
    "load",
    "locate",
    "verify",
]
