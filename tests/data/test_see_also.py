import importlib

import pytest
import torch

from postern.data import DataUnavailable, see_also
from postern.data.see_also import in_words, named_in

module = importlib.import_module("postern.data.see_also")  # the package has a function of this name
DOCSTRING = """Return the sum.

Parameters
----------
a : array

See Also
--------
ndarray.mean, numpy.prod : Equivalent method.
:func:`~numpy.cumsum` : Cumulative sum,
    see total : not a name.
trapz(y, x) : Integration.
pdf,
median

Notes
-----
Something: else.
"""


def test_names_are_read_from_the_section_alone():
    assert named_in(DOCSTRING) == ["mean", "prod", "cumsum", "trapz", "pdf", "median"]
    assert named_in("Return the sum.\n\nNotes\n-----\nmean : no.") == []
    assert named_in("See Also\n--------\nmean : at the end of all") == ["mean"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("getDefaultEncoding2", "get default encoding 2"),
        ("HTTPServer", "http server"),
        ("medfilt2d", "medfilt 2d"),
        ("__init__", "init"),
        ("r_", "r"),
        ("_", "_"),
    ],
)
def test_identifiers_are_taken_apart(name, words):
    assert in_words(name) == words


def test_what_numpy_says_of_std_is_there():
    splits = [see_also(split) for split in ("train", "validation", "test")]
    (found,) = ((data, row) for data in splits for row, text in enumerate(data.texts) if text.startswith("numpy std:"))
    data, row = found
    named = {data.labels[label].split(":")[0] for label in data.columns[data.rows == row].tolist()}
    assert named == {"numpy var", "numpy mean", "numpy nanmean", "numpy nanstd", "numpy nanvar"}
    (own,) = data.excluded[1][data.excluded[0] == row].tolist()
    assert data.labels[own].startswith("numpy std:")


def test_splits_part_the_queries_and_share_the_labels():
    for fold in (0, 3):
        splits = {split: see_also(split, fold) for split in ("train", "validation", "test")}
        texts = [set(data.texts) for data in splits.values()]
        total = sum(map(len, texts))
        assert len(set().union(*texts)) == total > 1500
        assert 0.15 < len(texts[2]) / total < 0.25
        assert len({data.labels for data in splits.values()}) == 1
        for data in splits.values():
            assert len(data.labels) > 1000
            assert (torch.bincount(data.rows, minlength=len(data)) > 0).all(), "a query without labels"
            pairs = data.rows * len(data.labels) + data.columns
            assert (pairs.diff() > 0).all(), "sorted, each once"
            own = data.excluded[0] * len(data.labels) + data.excluded[1]
            assert not torch.isin(own, pairs).any()
    covered = {text for fold in range(10) for text in see_also("test", fold).texts}
    assert len(covered) == total, "every query is tested in some fold"


def test_queries_of_one_name_are_in_one_split():
    splits = {split: set(see_also(split).texts) for split in ("train", "validation", "test")}
    by_name = {}
    for query in module._references().queries:
        (split,) = (split for split, texts in splits.items() if query.text in texts)
        by_name.setdefault(query.key, set()).add(split)
    assert all(len(found) == 1 for found in by_name.values())
    assert len(by_name) < len(module._references().queries), "no name occurs twice, so that nothing is tested"


LITTLE_LIBRARY = """
def one():
    '''First.

    See Also
    --------
    Thing.two : It.
    '''

class Thing:
    '''A thing.'''
    def two(self):
        '''Second.

        More.

        See Also
        --------
        one, two, nowhere
        '''

if True:
    def three():
        '''Third.

        See Also
        --------
        one
        '''

add_newdoc("little", "four", "Fourth.\\n\\nSee Also\\n--------\\none" + end)
add_newdoc("little", "five", "Fifth.\\n\\nSee Also\\n--------\\nthree")
add_newdoc("little", "Thing", ("six", "Sixth.\\n\\nSee Also\\n--------\\none"))
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library of our own in place of the installed ones."""
    folder = tmp_path / "little"
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").write_text(LITTLE_LIBRARY)
    (folder / "tests" / "test_it.py").write_text(
        'def seven():\n    """Seventh.\n\n    See Also\n    --------\n    one\n    """'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(module, "LIBRARIES", ("little",))
    module._references.cache_clear()
    yield folder
    module._references.cache_clear()


def test_a_library_of_our_own_is_read(library):
    found = {}
    for split in ("train", "validation", "test"):
        try:
            data = see_also(split)
        except ValueError:
            continue  # no text fell into it
        for row, label in zip(data.rows.tolist(), data.columns.tolist(), strict=True):
            found.setdefault(data.texts[row], []).append(data.labels[label])
    assert found == {
        "little one: First.": ["little thing two: Second."],
        "little thing two: Second.": ["little one: First."],
        "little three: Third.": ["little one: First."],
        "little five: Fifth.": ["little three: Third."],
        "little thing six: Sixth.": ["little one: First."],
    }


def test_libraries_without_source_say_so(library):
    for path in library.rglob("*.py"):
        path.write_text("")
    module._references.cache_clear()
    with pytest.raises(DataUnavailable, match="docstrings of little"):
        see_also("train")


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'all'"):
        see_also("all")
    with pytest.raises(ValueError, match=r"fold must be in 0\.\.9, got 10"):
        see_also("train", 10)
