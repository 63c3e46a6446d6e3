"""Load real files that a user might have, right ones and wrong ones."""

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from postern.data import DataUnavailable, Images, InvalidData, Table, Text, load, load_own, load_own_splits, own
from tests.data.conftest import encode, write_images
from tests.data.hub import serve


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


def table(path: Path, content: str, label: str = "kind", limit: int | None = None) -> Table:
    loaded = load_own(write(path, content), label=label, limit=limit)
    assert isinstance(loaded, Table)
    return loaded


def images(source: Path | str, **options: int) -> Images:
    loaded = load_own(source, **options)
    assert isinstance(loaded, Images)
    return loaded


def assert_refused(source: Path | str, *parts: str, label: str | None = None, **options: int) -> None:
    """Each part of the message: what was found, what is needed, what to do."""
    with pytest.raises(InvalidData) as caught:
        load_own_splits(source, label=label, **options)
    message = str(caught.value)
    assert message.startswith(str(caught.value.path))
    assert "expected" in message
    for part in parts:
        assert part in message


# -- texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["notes.txt", "notes.md", "notes.py", "notes", "notes.json"])
def test_a_file_in_utf8_is_a_text(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "\ufeffnaïve\r\nline\rend")
    assert load_own(path) == Text("naïve\nline\nend", name)
    assert load_own(str(path), limit=3) == Text("naï", name)
    assert load_own_splits(path).keys() == {"train"}


def test_a_folder_of_texts_is_joined_in_the_order_of_names(tmp_path: Path) -> None:
    for name, content in {"b.txt": "two", "a.txt": "one\n", "c/test.txt": "three", "README.txt": "not this"}.items():
        write(tmp_path / "book" / name, content)
    write(tmp_path / "book" / ".hidden.txt", "nor this")
    assert load_own(tmp_path / "book") == Text("one\ntwo\nthree\n", "book")


def test_texts_named_after_splits_are_splits(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write(tmp_path / f"wiki.{split}.txt", split)
    splits = load_own_splits(tmp_path)
    assert splits == {
        "train": Text("train", f"{tmp_path.name}, train"),
        "test": Text("test", f"{tmp_path.name}, test"),
    }
    (tmp_path / "wiki.train.txt").unlink()
    splits = load_own_splits(tmp_path)
    assert splits["train"] == Text("valid", f"{tmp_path.name}, validation in place of train")
    assert splits["test"] == Text("test", f"{tmp_path.name}, test")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["an empty file", "Give a file that holds something"]),
        (b"\xef\xbb\xbf", ["an empty file"]),
        (b" \n\t", ["only white space"]),
        (
            b"caf\xe9 au lait",
            ["not a text ('utf-8' codec can't decode byte 0xe9", "expected UTF-8", "Save it as UTF-8"],
        ),
        ("text".encode("utf-16"), ["not a text", "It looks like UTF-16"]),
        (b"a\0b", ["not a text (it holds zero bytes)"]),
        (encode(np.zeros((2, 2), dtype=np.uint8)), ["not a text", "one sub-folder a class"]),
        (b"PK\x03\x04\0\0", ["not a text", "Unpack it", "save a spreadsheet as CSV"]),
        (b"PAR1\0", ["name it .parquet"]),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, parts: Sequence[str]) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(content)
    assert_refused(path, str(path), *parts)


def test_a_text_takes_no_label_and_no_image_size(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"a.txt is a text \(a table's name ends in .csv.*got label='b'"):
        load_own(path, label="b")
    with pytest.raises(ValueError, match="takes no image_size; got image_size=8"):
        load_own(path, image_size=8)


# -- tables ---------------------------------------------------------------------------------------------------------

FLOWERS = """\
length,colour,kind,width
1.5,red,rose,2
2.5,blue,iris,-1e-1
3.5,red,rose,0
4.5,blue,iris,7
"""


@pytest.mark.parametrize("name, delimiter", [("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t")])
def test_a_table_is_encoded(tmp_path: Path, name: str, delimiter: str) -> None:
    loaded = table(tmp_path / name, FLOWERS.replace(",", delimiter))
    assert loaded.feature_names == ("length", "colour=blue", "colour=red", "width")
    np.testing.assert_array_equal(loaded.features, [[1.5, 0, 1, 2], [2.5, 1, 0, -0.1], [3.5, 0, 1, 0], [4.5, 1, 0, 7]])
    assert loaded.target_names == ("iris", "rose")
    assert loaded.target.tolist() == [1, 0, 1, 0]
    assert loaded.target.dtype == np.int64
    assert loaded.name == name


def test_quoted_cells_blank_lines_and_spaces(tmp_path: Path) -> None:
    content = '\ufeff"size, cm", kind\r\n\r\n1, "a ""b"""\r\n2 ,"c\r\nd"\r\n3,"a ""b"""\r\n4,"c\r\nd"\r\n,\r\n'
    loaded = table(tmp_path / "a.csv", content)
    assert loaded.feature_names == ("size, cm",)
    assert loaded.features[:, 0].tolist() == [1, 2, 3, 4]
    assert loaded.target_names == ('a "b"', "c\nd")


def test_a_comma_is_a_decimal_comma_where_semicolons_delimit(tmp_path: Path) -> None:
    loaded = table(tmp_path / "a.csv", "x;kind\n1,5;a\n-2;a\n3,25e1;b\n,5;b\n")
    assert loaded.features[:, 0].tolist() == [1.5, -2, 32.5, 0.5]


def test_numeric_labels_are_sorted_by_value(tmp_path: Path) -> None:
    loaded = table(tmp_path / "a.csv", "x,kind\n" + "\n".join(f"{i * i},{i % 12}" for i in range(24)))
    assert loaded.target_names == tuple(map(str, range(12)))
    assert loaded.target.tolist() == [*range(12)] * 2


def test_columns_that_say_nothing_are_left_out_and_told(tmp_path: Path) -> None:
    header = ",x,same,always,passengerId,name,city,town,kind\n"
    rows = [
        f"{i},{i % 5},1,yes,{7 * i % 101},name {i},city {i % 60},town {i % 51 % 50},{'ab'[i % 2]}" for i in range(100)
    ]
    loaded = table(tmp_path / "a.csv", header + "\n".join(rows))
    assert loaded.feature_names == ("x", *sorted(f"town=town {i}" for i in range(50)))
    for told in (
        "a.csv (without 'column 1': counts the rows;",
        "'same': the same value in every row",
        "'always': the same value in every row",
        "'passengerId': an id",
        "'name': 100 different words in 100 rows",
        "'city': 60 different words in 100 rows",
    ):
        assert told in loaded.name


def test_words_that_rarely_come_twice_are_left_out(tmp_path: Path) -> None:
    words = ["a", "b", "c", "d", "e", "e", "e", "e"]
    loaded = table(tmp_path / "a.csv", "x,word,kind\n" + "\n".join(f"{i % 3},{w},{i % 2}" for i, w in enumerate(words)))
    assert loaded.feature_names == ("x",)
    assert loaded.name == "a.csv (without 'word': 5 different words in 8 rows)"


def test_a_shuffled_row_number_is_left_out_but_other_integers_stay(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(40)
    rows = [f"{order[i]},{order[i] ** 2},{'ab'[i // 20]}" for i in range(40)]
    loaded = table(tmp_path / "a.csv", "n,square,kind\n" + "\n".join(rows))
    assert loaded.feature_names == ("square",)


def test_limit_keeps_the_classes_of_a_sorted_table(tmp_path: Path) -> None:
    rows = [f"{i * 3 % 17},{'a' if i < 60 else 'b' if i < 90 else 'c'}" for i in range(100)]
    content = "x,kind\n" + "\n".join(rows)
    loaded = table(tmp_path / "a.csv", content, limit=20)
    assert np.bincount(loaded.target).tolist() == [12, 6, 2]
    assert loaded.features[:, 0].tolist() == [i * 3 % 17 for i in (*range(12), *range(60, 66), 90, 91)]
    assert np.bincount(table(tmp_path / "a.csv", content, limit=7).target).tolist() == [3, 2, 2]
    assert len(table(tmp_path / "a.csv", content, limit=1000)) == 100
    with pytest.raises(ValueError, match="limit=5 is too small for 3 classes; it is at least 6"):
        table(tmp_path / "a.csv", content, limit=5)


def test_a_folder_of_tables_has_one_encoding(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "x,colour,kind\n1,red,a\n2,red,b\n3,blue,a\n4,blue,b\n")
    write(tmp_path / "test.csv", "colour,x,kind\nred,5,b\ngreen,6,b\nblue,7,b\ngreen,8,b\n")
    splits = load_own_splits(tmp_path, label="kind")
    train, test = splits["train"], splits["test"]
    assert isinstance(train, Table)
    assert isinstance(test, Table)
    assert train.feature_names == test.feature_names == ("x", "colour=blue", "colour=green", "colour=red")
    assert train.target_names == test.target_names == ("a", "b")
    np.testing.assert_array_equal(test.features, [[5, 0, 0, 1], [6, 0, 1, 0], [7, 1, 0, 0], [8, 0, 1, 0]])
    assert test.target.tolist() == [1, 1, 1, 1]
    assert test.name == f"{tmp_path.name}, test"
    np.testing.assert_array_equal(load_own(tmp_path, label="kind").features, train.features)
    write(tmp_path / "test.csv", "colour,x,kind\nred,5,c\n red,6,c\n")
    assert_refused(tmp_path, "test.csv: line 2 has the label 'c'", "'a', 'b'", "Correct it", label="kind")
    write(tmp_path / "test.csv", "x,colour\n5,red\n6,red\n")
    assert_refused(tmp_path, "other columns than in", "'kind' in one of them only", "Give one file", label="kind")


def test_tables_of_a_folder_are_joined_in_the_order_of_names(tmp_path: Path) -> None:
    for name, start in {"part-10": 2, "part-02": 0}.items():
        write(tmp_path / f"{name}.csv", f"x,kind\n{start}.5,a\n{start + 1}.5,b\n")
    loaded = load_own(tmp_path, label="kind")
    assert isinstance(loaded, Table)
    assert loaded.features[:, 0].tolist() == [0.5, 1.5, 2.5, 3.5]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("x,kind\n1,a\n2,a,3\n", ["line 3 has 3 cells", "expected 2 in every line", "into quotation marks"]),
        ('x,kind\n1,"a\nb"\n\n2\n', ["line 5 has 1 cells"]),
        ('x,kind\n1,a\n2,"a\nb",3\n', ["line 3 has 3 cells"]),
        ('x,kind\n1,a\n2,"b\n3,c\n', ["the row that begins in line 3 is no CSV", "Check the quotation marks"]),
        ("x,kind,x\n1,a,2\n", ["2 columns called 'x'", "Rename or remove"]),
        ("5.1,3.5,0\n4.9,3.0,0\n", ["a first line of numbers, '5.1', '3.5', '0'", "a header", "Add one"]),
        ("kind\na\nb\n", ["only one column, 'kind'", "Check the delimiter"]),
        ("x|kind\n1|a,b\n", ["only one column, 'x|kind'"]),
        ("x,kind\n", ["no rows below the header", "Add rows"]),
        ("x,kind\n1,a\n", ["1 row below the header"]),
        ("x,y,kind\n1,2,a\n,3,b\n4,NA,a\n5,?,b\n", ["line 3 has no value in the column 'x'", "'x' (1), 'y' (2)"]),
        ("x,y,kind\n1,2,a\n2,NaN,b\n", ["line 3 has no value in the column 'y', 'NaN'", "Fill it in, or remove"]),
        ("x,kind\n1,a\n2,\n", ["line 3 has no value in the column 'kind'"]),
        ("x,kind\n1,a\nten,b\n3,a\n4,b\n", ["line 3 holds 'ten' in the column 'x'", "3 of 4 cells are numbers"]),
        ("x,kind\n1,a\n1_0,b\n3,a\n4,b\n", ["line 3 holds '1_0'"]),
        ("x,kind\n1,a\n1e999,b\n3,a\n4,b\n", ["line 3 holds '1e999'", "finite numbers"]),
        ("x,kind\n1,a\n-nan,b\n3,a\n4,b\n", ["line 3 holds '-nan'"]),
        ("x,kind\n1,a\n2,a\n", ["holds 'a' in every row", "at least two classes"]),
        ("x,kind\n1,a\n2,b\n3,c\n", ["holds 3 different values in 3 rows", "an id or a free text"]),
        ("x,kind\n1,0.5\n2,0.7\n3,1.5\n", ["holds 3 different values in 3 rows", "a value to regress"]),
        ("x,kind\n1,a\n2,a\n3,b\n4,c\n", ["a single row of each of the classes 'b', 'c'", "two rows of each"]),
        ("x,y,kind\n1,p,a\n1,q,a\n1,r,b\n1,s,b\n", ["no column to tell the classes by", "'y': 4 different words"]),
    ],
)  # fmt: skip
def test_wrong_tables_are_refused(tmp_path: Path, content: str, parts: Sequence[str]) -> None:
    path = write(tmp_path / "a.csv", content)
    assert_refused(path, str(path), *parts, label="kind")


def test_a_value_to_regress_is_no_class(tmp_path: Path) -> None:
    prices = write(tmp_path / "a.csv", "x,price\n" + "\n".join(f"{i % 7},{i % 40}.5" for i in range(400)))
    assert_refused(prices, "holds 40 different values in 400 rows", "a value to regress", label="price")
    counts = write(tmp_path / "b.csv", "x,count\n" + "\n".join(f"{i % 7},{i % 60}" for i in range(100)))
    assert_refused(counts, "holds 60 different values in 100 rows", "a value to regress", label="count")


def test_the_label_must_be_named_and_be_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", FLOWERS)
    columns = "'length', 'colour', 'kind', 'width'"
    assert_refused(path, f"a table with the columns {columns}, and no label named", "--label COLUMN")
    assert_refused(path, f"no column 'Kinds' among {columns}", "Did you mean 'kind'?", label="Kinds")
    assert_refused(path, "Choose one of them", label="zzz")
    headless = write(tmp_path / "b.csv", "5.1,3.5,rose\n4.9,3.0,rose\n5.0,3.1,iris\n")
    assert_refused(headless, "the first line holds the names; does it?", label="kind")
    wide = write(tmp_path / "c.csv", ",".join(f"x{i}" for i in range(30)) + "\n" + ("1," * 29 + "1\n") * 2)
    assert_refused(wide, "'x11', 14 more, 'x26', 'x27', 'x28', 'x29', and no label")
    with pytest.raises(ValueError, match="a table, which takes no image_size"):
        load_own(path, label="kind", image_size=8)


def test_a_header_that_counts_is_a_header(tmp_path: Path) -> None:
    assert table(tmp_path / "a.csv", "0,1,2\n5,6,a\n7,7,a\n8,5,b\n9,9,b\n", label="2").feature_names == ("0", "1")


def test_a_csv_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("x,kind\n1,é\n".encode("latin-1"))
    assert_refused(path, "not a text", "Save it as CSV in UTF-8", label="kind")


def is_word(word: str) -> bool:
    """Whether a cell is a word: neither a number, nor missing."""
    try:
        float(word)
    except ValueError:
        return word.lower() not in {"na", "n/a", "nan", "null", "?"} and word.strip() == word
    return False


words = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zs", "Zl", "Zp")), min_size=1, max_size=8).filter(
    is_word
)


@st.composite
def tables(draw: st.DrawFn) -> tuple[str, dict[str, list[str] | list[float]], list[str]]:
    """A delimiter, columns of numbers or words, and labels; every word and every label comes twice or more."""
    rows = draw(st.integers(2, 4)) * 2
    delimiter = draw(st.sampled_from(",;\t"))
    names = draw(
        st.lists(words.filter(lambda name: not set(name) & set(",;\t\ufeff")), min_size=1, max_size=4, unique=True)
    )
    columns: dict[str, list[str] | list[float]] = {}
    for name in names:
        if draw(st.booleans()):
            half = draw(
                st.lists(words, min_size=rows // 2, max_size=rows // 2).filter(lambda half: len(set(half)) > 1)
                if rows > 2
                else st.just(["a", "b"])
            )
            columns[name] = draw(st.permutations(half * 2))
        else:
            numbers = st.floats(allow_nan=False, allow_infinity=False)
            columns[name] = draw(st.lists(numbers, min_size=rows, max_size=rows).filter(lambda x: len(set(x)) > 1))
    half = draw(st.lists(words, min_size=rows // 2, max_size=rows // 2))
    return delimiter, columns, half * 2


@settings(max_examples=80, deadline=None)
@given(tables())
def test_a_csv_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[str, dict[str, list[str] | list[float]], list[str]]
) -> None:
    delimiter, columns, labels = drawn
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerow([*columns, "the label"])
    writer.writerows(zip(*columns.values(), labels, strict=True))
    write(path, stream.getvalue())
    if len(set(labels)) == 1:
        assert_refused(path, "in every row", label="the label")
        return
    loaded = load_own(path, label="the label")
    assert isinstance(loaded, Table)
    assert [loaded.target_names[index] for index in loaded.target] == labels
    assert loaded.target_names == tuple(sorted(set(labels)))
    for name, cells in columns.items():
        if isinstance(cells[0], float):
            if name in loaded.feature_names:
                assert loaded.features[:, loaded.feature_names.index(name)].tolist() == cells
            else:
                assert re.search(r"(?i:^(?:id|idx|index|row)|id)$", name)
        else:
            ours = {word: loaded.features[:, loaded.feature_names.index(f"{name}={word}")] for word in set(cells)}
            for word, column in ours.items():
                assert column.tolist() == [float(cell == word) for cell in cells]


# -- parquet --------------------------------------------------------------------------------------------------------


def write_parquet(path: Path, columns: dict[str, object], class_labels: dict[str, list[str]] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = pa.table(columns)
    if class_labels:
        features = {name: {"_type": "ClassLabel", "names": names} for name, names in class_labels.items()}
        written = written.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(written, path)
    return path


def test_a_parquet_table_is_encoded(tmp_path: Path) -> None:
    columns = {
        "x": [1, 2, 3, 4],
        "yes": [True, False, False, True],
        "colour": pa.array(["red", "blue", "red", "blue"]).dictionary_encode(),
        "price": pa.array([1, 2, 4, 3], pa.decimal128(5, 2)),
        "tags": [["a"], ["b"], ["c"], ["d"]],
        "class": [10, 9, 10, 9],
    }
    loaded = load_own(write_parquet(tmp_path / "a.parquet", columns), label="class")
    assert isinstance(loaded, Table)
    assert loaded.feature_names == ("x", "yes", "colour=blue", "colour=red", "price")
    np.testing.assert_array_equal(loaded.features, [[1, 1, 0, 1, 1], [2, 0, 1, 0, 2], [3, 0, 0, 1, 4], [4, 1, 1, 0, 3]])
    assert loaded.target_names == ("9", "10")
    assert loaded.target.tolist() == [1, 0, 1, 0]
    assert "without 'tags'" in loaded.name


def test_the_hubs_names_of_classes_are_used(tmp_path: Path) -> None:
    columns = {"x": [1.0, 2.0, 3.0, 4.0], "label": [2, 0, 2, 0]}
    path = write_parquet(tmp_path / "a.parquet", columns, {"label": ["zebra", "yak", "ape"]})
    loaded = load_own(path, label="label")
    assert isinstance(loaded, Table)
    assert loaded.target_names == ("zebra", "ape")
    assert loaded.target.tolist() == [1, 0, 1, 0]


def test_a_parquet_text(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"id": [1, 2, 3], "text": ["one", None, "two\n"]})
    assert load_own(path) == Text("one\n\ntwo\n", "a.parquet")
    assert load_own(path, limit=2) == Text("on", "a.parquet")
    assert load_own(write_parquet(tmp_path / "b.parquet", {"sentence": ["a b"]})) == Text("a b\n", "b.parquet")
    assert_refused(write_parquet(tmp_path / "c.parquet", {"x": [1], "y": ["a"]}), "no label named")


def test_parquet_images(tmp_path: Path) -> None:
    pixels = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4)
    path = tmp_path / "a.parquet"
    write_images(path, [encode(image) for image in pixels], [5, 3, 5, 3, 5, 3], image="picture")
    loaded = images(path)
    assert torch.equal(loaded.pixels[:, 0], torch.from_numpy(pixels))
    assert loaded.class_names == ("3", "5")
    assert loaded.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert torch.equal(images(path, limit=4).pixels, loaded.pixels[:4])
    write_images(path, [encode(pixels[0]), b"junk", encode(pixels[0]), encode(pixels[0])], [0, 1, 0, 1])
    assert_refused(path, "row 1 does not decode as an image (unknown format)", "Replace or remove")
    cells = [{"bytes": None, "path": "a.png"}] * 4
    write_parquet(
        path, {"image": pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()})), "label": [0, 1] * 2}
    )
    assert_refused(path, "row 0 holds no image bytes in the column 'image'")
    assert_refused(path, "no column 'lable'", "Did you mean 'label'?", label="lable")


def test_wrong_parquet_files_are_refused(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "a.parquet", {"x": [1.0, None, 2.0], "kind": ["a", "b", "a"]})
    assert_refused(whole, "row 1 has no value in the column 'x'", label="kind")
    path = tmp_path / "b.parquet"
    path.write_bytes(whole.read_bytes()[:-3])
    assert_refused(path, "not a whole parquet file", label="kind")
    path.write_bytes(b"")
    assert_refused(path, "not a whole parquet file", label="kind")
    assert_refused(write_parquet(path, {"x": pa.array([], pa.int64()), "y": pa.array([], pa.int64())}), "no rows")
    write_parquet(tmp_path / "c/train-0.parquet", {"x": [1, 2], "kind": ["a", "b"]})
    write_parquet(tmp_path / "c/train-1.parquet", {"y": [1, 2], "kind": ["a", "b"]})
    assert_refused(
        tmp_path / "c", "train-1.parquet: the columns 'y', 'kind'", "make the columns the same", label="kind"
    )
    write_images(tmp_path / "d/train.parquet", [encode(noise(2, 2))] * 4, [0, 1] * 2)
    write_parquet(tmp_path / "d/test.parquet", {"picture": [1, 2], "label": [0, 1]})
    assert_refused(tmp_path / "d", "test.parquet: the columns 'picture', 'label'", "those of", "'image', 'label'")
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"]), path)
    assert_refused(path, "2 columns called 'x'", label="x")


# -- folders of images ----------------------------------------------------------------------------------------------


def save(path: Path, pixels: np.ndarray | Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return path


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_a_folder_of_images_has_a_class_a_sub_folder(tmp_path: Path) -> None:
    pixels = noise(4, 6, 5)
    for index, name in enumerate(["dog/b.png", "cat/x.bmp", "cat/deep/a.PNG", "dog/a.gif"]):
        save(tmp_path / "pets" / name, pixels[index])
    write(tmp_path / "pets/cat/notes.txt", "not an image")
    write(tmp_path / "pets/.git/config", "hidden")
    loaded = images(tmp_path / "pets")
    assert loaded.class_names == ("cat", "dog")
    assert loaded.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(loaded.pixels[:, 0], torch.from_numpy(pixels[[2, 1, 3, 0]]))
    assert loaded.name == "pets"


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "gif", "webp"])
def test_every_format_keeps_its_colours(tmp_path: Path, suffix: str) -> None:
    for name, colour in {"a": (200, 30, 60), "b": (20, 180, 90)}.items():
        for number in range(2):
            save(tmp_path / name / f"{number}.{suffix}", Image.new("RGB", (8, 8), colour))
    pixels = images(tmp_path).pixels.to(torch.float32)
    assert pixels.shape == (4, 3, 8, 8)
    for index, colour in ((0, (200, 30, 60)), (3, (20, 180, 90))):
        assert (pixels[index].mean((1, 2)) - torch.tensor(colour)).abs().max() < 5


def test_grey_becomes_colour_where_one_is_in_colour(tmp_path: Path) -> None:
    grey = noise(3, 4, 4)
    for index in range(3):
        save(tmp_path / f"{'ab'[index % 2]}/{index}.png", grey[index])
    colour = save(tmp_path / "b/3.png", noise(4, 4, 3, seed=1))
    loaded = images(tmp_path)
    assert loaded.pixels.shape == (4, 3, 4, 4)
    assert torch.equal(loaded.pixels[0], torch.from_numpy(grey[0]).expand(3, 4, 4))
    assert torch.equal(loaded.pixels[3], torch.from_numpy(np.array(Image.open(colour))).permute(2, 0, 1))


def test_the_most_frequent_size_wins_and_proportions_stay(tmp_path: Path) -> None:
    for index in range(3):
        save(tmp_path / f"{'ab'[index % 2]}/{index}.png", Image.new("L", (8, 6), 10))
    # Twice as wide as needed: a quarter is cut off at the left and at the right.
    wide = np.repeat(np.repeat(np.array([[0, 100, 200, 255]], dtype=np.uint8), 8, axis=1), 12, axis=0)
    save(tmp_path / "b/wide.png", wide)
    loaded = images(tmp_path)
    assert loaded.pixels.shape == (4, 1, 6, 8)
    row = loaded.pixels[3, 0, 3].tolist()
    assert row[1:3] == [100, 100]
    assert row[5:7] == [200, 200]
    assert loaded.name == f"{tmp_path.name} (2 sizes brought to 8x6 pixels)"
    assert images(tmp_path, image_size=5).pixels.shape == (4, 1, 5, 5)


def test_large_images_are_scaled_down_to_64(tmp_path: Path) -> None:
    for index in range(4):
        save(tmp_path / f"{'ab'[index % 2]}/{index}.png", Image.new("L", (640, 320), 60 * index))
    loaded = images(tmp_path)
    assert loaded.pixels.shape == (4, 1, 32, 64)
    assert loaded.pixels.amax((1, 2, 3)).tolist() == loaded.pixels.amin((1, 2, 3)).tolist() == [0, 120, 60, 180]
    assert loaded.name.endswith("(640x320 brought to 64x32 pixels)")
    assert images(tmp_path, image_size=100).pixels.shape == (4, 1, 100, 100)


def test_transparency_16_bits_palettes_and_orientation(tmp_path: Path) -> None:
    clear = np.zeros((4, 4, 4), dtype=np.uint8)
    clear[1, 1] = (255, 0, 0, 255)
    save(tmp_path / "a/clear.png", clear)
    save(tmp_path / "a/deep.png", np.full((4, 4), 0x80FF, dtype=np.uint16))
    save(tmp_path / "b/palette.png", Image.new("RGB", (4, 4), (1, 2, 3)).quantize(4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    save(
        tmp_path / "b/turned.jpg",
        np.repeat(np.array([[0], [255]], dtype=np.uint8), 2, 0).repeat(4, 1),
        exif=exif,
        quality=100,
    )
    pixels = images(tmp_path).pixels
    assert pixels[0, :, 0, 0].tolist() == [255, 255, 255], "transparent is white"
    assert pixels[0, :, 1, 1].tolist() == [255, 0, 0]
    assert pixels[1].unique().tolist() == [0x80]
    assert pixels[2, :, 0, 0].tolist() == [1, 2, 3]
    assert (pixels[3, :, :, 0] > 250).all(), "what was below is at the left"
    assert (pixels[3, :, :, 3] < 5).all()


def test_splits_of_images_have_the_same_classes_and_sizes(tmp_path: Path) -> None:
    for index in range(4):
        save(tmp_path / f"train/{'ab'[index % 2]}/{index}.png", noise(6, 6, seed=index))
    test = noise(6, 6, seed=9)
    save(tmp_path / "test/b/0.png", test)
    splits = load_own_splits(tmp_path)
    assert splits["train"].class_names == splits["test"].class_names == ("a", "b")
    assert splits["train"].labels.tolist() == [0, 0, 1, 1]
    assert splits["test"].labels.tolist() == [1]
    assert torch.equal(splits["test"].pixels[0, 0], torch.from_numpy(test))
    assert splits["test"].name == f"{tmp_path.name}, test"
    save(tmp_path / "test/c/0.png", test)
    assert_refused(
        tmp_path, f"{tmp_path / 'test/c'}: a class of the test split that the train split does not have", "'a', 'b'"
    )


def test_limit_takes_some_of_each_class(tmp_path: Path) -> None:
    for index in range(12):
        save(tmp_path / f"{'a' if index < 8 else 'b'}/{index:02}.png", noise(3, 3, seed=index))
    loaded = images(tmp_path, limit=6)
    assert loaded.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert torch.equal(loaded.pixels[4, 0], torch.from_numpy(noise(3, 3, seed=8)))


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "an empty folder", "sub-folders of images", "give another folder")
    write(tmp_path / "other/a.heic", "x")
    assert_refused(tmp_path / "other", "no images, tables or texts, only .heic (1)", "Convert what is there")
    pets = tmp_path / "pets"
    save(pets / "cat/a.png", noise(3, 3))
    save(pets / "cat/b.png", noise(3, 3))
    assert_refused(pets, "a single class, 'cat'", "at least two classes", "Give the folder above it")
    (pets / "dog").mkdir()
    assert_refused(pets, f"{pets / 'dog'}: a class without images", "Remove it")
    save(pets / "dog/a.png", noise(3, 3))
    assert_refused(pets, f"{pets / 'dog'}: a class with a single image", "at least two of each class")
    save(pets / "dog/b.png", noise(3, 3))
    with pytest.raises(ValueError, match="a folder of images, which takes no label; got label='kind'"):
        load_own(pets, label="kind")
    damaged = pets / "dog/c.png"
    damaged.write_bytes(encode(noise(30, 30))[:500])
    assert_refused(pets, f"{damaged}: does not decode as an image", "Replace or remove it")
    damaged.write_bytes(b"")
    assert_refused(pets, f"{damaged}: does not decode as an image (unknown format)")
    damaged.rename(pets / "c.png")
    assert_refused(pets, f"{pets / 'c.png'}: an image outside of the classes' sub-folders", "Move it")
    with pytest.raises(ValueError, match="image_size is a positive number of pixels or None, got 0"):
        load_own(pets, image_size=0)


# -- known data sets ------------------------------------------------------------------------------------------------


def test_a_known_data_set_brings_its_test_split() -> None:
    splits = load_own_splits("iris")
    for split in ("train", "test"):
        expected = load("iris", split)
        np.testing.assert_array_equal(splits[split].features, expected.features)
        assert splits[split].name == expected.name
    assert len(load_own("digits", limit=20)) == 20
    with pytest.raises(ValueError, match="'iris' is a known data set, which takes no label"):
        load_own("iris", label="species")


def test_a_known_name_is_not_the_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "wine/a.txt", "a text about wine\n")
    assert isinstance(load_own("wine"), Table)
    assert load_own("./wine") == load_own(Path("wine")) == Text("a text about wine\n", "wine")


def test_what_is_there_of_a_known_text_is_used_and_told(root: Path) -> None:
    with pytest.raises(DataUnavailable, match="the split 'train' of 'ptb'"):
        load_own("ptb")
    write(root / "ptb/ptb.test.txt", " a b \n" * 3761)
    (only,) = load_own_splits("ptb", limit=10).values()
    assert only == Text("a b\na b\na ", "ptb, test in place of train")
    write(root / "ptb/ptb.valid.txt", " c d \n" * 3370)
    splits = load_own_splits("ptb", limit=4)
    assert splits == {
        "train": Text("c d\n", "ptb, validation in place of train"),
        "test": Text("a b\n", "ptb, test"),
    }
    assert load_own("ptb", limit=4) == splits["train"]


def test_images_without_their_train_split_are_unavailable(root: Path, write_mnist_test) -> None:
    write_mnist_test(root / "ylecun/mnist")
    with pytest.raises(DataUnavailable, match="the split 'train' of 'ylecun/mnist'"):
        load_own("ylecun/mnist")


def test_a_train_split_alone_says_that_the_test_split_is_not_here(root: Path) -> None:
    write(root / "ptb/ptb.train.txt", " a b \n" * 42_068)
    (train,) = load_own_splits("ptb", limit=4).values()
    assert train == Text("a b\n", "ptb, train (its test split is not available)")


# -- the Hub --------------------------------------------------------------------------------------------------------

HUB_ID = "somebody/animals"


def put_animals(folder: Path, pattern: str = "data/{split}-00000-of-00001.parquet", count: int = 4) -> Path:
    for split, value in (("train", 1), ("validation", 2), ("test", 3)):
        pictures = [encode(np.full((4, 4), 10 * value + index % 2, dtype=np.uint8)) for index in range(count)]
        write_images(folder / pattern.format(split=split), pictures, [index % 2 for index in range(count)])
    return folder


@pytest.mark.parametrize(
    "pattern", ["data/{split}-00000-of-00001.parquet", "default/{split}/0000.parquet", "{split}.parquet"]
)
def test_local_files_in_the_hubs_layout(root: Path, pattern: str) -> None:
    put_animals(root / HUB_ID, pattern)
    splits = load_own_splits(HUB_ID)
    assert splits["train"].pixels[:, 0, 0, 0].tolist() == [10, 11, 10, 11]
    assert splits["test"].pixels[:, 0, 0, 0].tolist() == [30, 31, 30, 31]
    assert (splits["train"].name, splits["test"].name) == (f"{HUB_ID}, train", f"{HUB_ID}, test")


def test_a_configuration_is_chosen_by_its_folder(root: Path) -> None:
    for name in ("large", "small"):
        write(root / f"somebody/words/{name}/train.csv", f"x,kind\n1,{name}\n2,b\n3,{name}\n4,b\n")
    assert_refused("somebody/words", "data files in 'large', 'small'", "Give one of the folders", label="kind")
    loaded = load_own("somebody/words/small", label="kind")
    assert isinstance(loaded, Table)
    assert loaded.target_names == ("b", "small")
    assert loaded.name == "somebody/words/small, train"
    assert_refused("somebody/words/tiny", "expected some in 'tiny'", "somebody/words/large", label="kind")
    write(root / "somebody/words/default/train.csv", FLOWERS)
    assert load_own("somebody/words", label="kind").target_names == ("iris", "rose")


def test_local_csv_text_and_images_in_the_hubs_layout(root: Path) -> None:
    for index in range(4):
        save(root / f"somebody/pets/small/{'ab'[index % 2]}/{index}.png", noise(3, 3, seed=index))
    assert images("somebody/pets/small").class_names == ("a", "b")
    assert_refused("somebody/pets/large", f"{root / 'somebody/pets/large'}: an empty folder")
    write(root / "somebody/table/data.csv", FLOWERS)
    assert len(load_own("somebody/table", label="kind")) == 4
    write(root / "somebody/book/part.txt", "words")
    assert load_own("somebody/book") == Text("words", "somebody/book")


def test_what_is_nowhere_says_where_was_looked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataUnavailable) as caught:
        load_own(HUB_ID)
    message = str(caught.value)
    for part in (
        "'somebody/animals' is not available. Looked in four places",
        f"there is no {Path(HUB_ID).absolute()}",
        "it is not one of them",
        f"there is no folder {root / HUB_ID}",
        "(4) the Hub, https://huggingface.co/datasets/somebody/animals: OfflineModeIsEnabled",
        "to $POSTERN_DATA/somebody/animals/.",
    ):
        assert part in message
    write(root / HUB_ID / "README.md", "nothing else")
    with pytest.raises(DataUnavailable, match="has no parquet, csv or text files"):
        load_own(HUB_ID)
    monkeypatch.delenv("POSTERN_DATA")
    with pytest.raises(DataUnavailable, match="POSTERN_DATA is not set"):
        load_own(HUB_ID)


def test_the_hubs_conversion_is_downloaded_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = put_animals(tmp_path / "repository", "default/{split}/0000.parquet")
    with serve(repository, HUB_ID, monkeypatch) as hub:
        splits = load_own_splits(HUB_ID)
        assert splits["test"].pixels[:, 0, 0, 0].tolist() == [30, 31, 30, 31]
        assert sorted(hub.downloads) == ["default/test/0000.parquet", "default/train/0000.parquet"]
        load_own(HUB_ID)
        assert len(hub.downloads) == 2
        monkeypatch.setattr(own, "_LARGEST_DOWNLOAD", 1)
        with pytest.raises(ValueError, match=r"more than .* GiB are not downloaded unasked. Copy those that you want"):
            load_own(HUB_ID)
    # The server is gone, the cache is there.
    assert torch.equal(images(HUB_ID).pixels, splits["train"].pixels)


@pytest.mark.skipif(
    not hasattr(huggingface_hub, "get_cached_repo_tree"), reason="this client does not know which files are missing"
)
def test_a_download_that_was_cut_off_is_not_taken_for_whole(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = put_animals(tmp_path / "repository", "default/{split}/0000.parquet")
    put_animals(repository, "default/{split}/0001.parquet")
    with serve(repository, HUB_ID, monkeypatch):
        assert len(images(HUB_ID)) == 8
    assert len(images(HUB_ID)) == 8
    (shard,) = (tmp_path / "hub").glob("**/snapshots/*/default/train/0001.parquet")
    shard.unlink()
    with pytest.raises(DataUnavailable, match=r"\(4\) the Hub, .*: Connect"):
        load_own(HUB_ID)


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("cifar10", "Did you mean 'uoft-cs/cifar10'"),
        ("mine.csv", "Did you mean 'mime.csv'?"),
        ("a/b.csv", "See: postern data list"),
        ("zzz", 'the id of one on the Hub ("owner/name")'),
    ],
)
def test_a_source_that_is_not_there_gives_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mime.csv", FLOWERS)
    assert_refused(source, f"{source}: no such file or folder", hint)


def test_misuse_is_told() -> None:
    with pytest.raises(ValueError, match="got an empty name"):
        load_own(" ")
    with pytest.raises(ValueError, match="limit is a positive integer or None, got 0"):
        load_own("iris", limit=0)
    with pytest.raises(InvalidData, match=re.escape("/dev/null: neither a file nor a folder")):
        load_own("/dev/null")
