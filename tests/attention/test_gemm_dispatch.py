"""The table of matrix products: thresholds against all others, and files that must not be believed."""

import itertools
import json
import math
import re
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from postern.attention import GemmDispatcher, pack_weight
from postern.attention.gemm_dispatch import KERNELS, default_path, machine_of

SHAPE = (48, 16)
SECONDS = {
    1: {"gemv": 1e-6, "flat": 2e-6, "vendor": 3e-6},
    4: {"gemv": 4e-6, "flat": 2e-6, "vendor": 3e-6},
    16: {"gemv": 1.6e-5, "flat": 5e-6, "vendor": 4e-6},
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTERN_CACHE", str(tmp_path / "cache"))


def test_thresholds_and_choices():
    dispatcher = GemmDispatcher({SHAPE: SECONDS})
    assert dispatcher.thresholds(*SHAPE) == (4, 16)
    chosen = [dispatcher.choose(rows, *SHAPE) for rows in (1, 3, 4, 15, 16, 17)]
    assert chosen == ["gemv", "gemv", "flat", "flat", "vendor", "vendor"]
    assert dispatcher.choose(1, 48, 17) == "vendor"
    with pytest.raises(ValueError, match=r"\(48, 17\) were not measured; there are: \(48, 16\)"):
        dispatcher.thresholds(48, 17)
    alone = GemmDispatcher({SHAPE: {1: SECONDS[1], 4: SECONDS[1]}})
    assert alone.thresholds(*SHAPE) == (math.inf, math.inf)
    assert [alone.choose(rows, *SHAPE) for rows in (1, 4, 5)] == ["gemv", "gemv", "vendor"]


@given(st.lists(st.tuples(*[st.floats(1e-6, 1e-3)] * 3), min_size=1, max_size=5))
def test_no_other_thresholds_are_faster(times):
    table = {2**index: dict(zip(KERNELS, row, strict=True)) for index, row in enumerate(times)}
    dispatcher = GemmDispatcher({SHAPE: table})

    def cost(first, second):
        return sum(
            math.log(row["gemv" if m < first else "flat" if m < second else "vendor"]) for m, row in table.items()
        )

    edges = [*table, math.inf]
    best = min(cost(*pair) for pair in itertools.product(edges, edges) if pair[0] <= pair[1])
    assert cost(*dispatcher.thresholds(*SHAPE)) == pytest.approx(best)


@given(st.integers(0, 4), st.integers(0, 4))
def test_agrees_with_the_paper_where_each_kernel_is_best_in_one_stretch(first, second):
    first, second = sorted((first, second))
    table = {
        2**index: {
            name: 1.0 if name == ("gemv" if index < first else "flat" if index < second else "vendor") else 2.0
            for name in KERNELS
        }
        for index in range(5)
    }
    edges = [*table, math.inf]
    assert GemmDispatcher({SHAPE: table}).thresholds(*SHAPE) == (edges[first], edges[second])


@pytest.mark.parametrize("rows", [0, 1, 4, 16, 40])
def test_every_kernel_gives_the_product(rows):
    dispatcher = GemmDispatcher({SHAPE: SECONDS})
    x, weight, bias = torch.randn(rows, 16), torch.randn(SHAPE), torch.randn(48)
    for packed in (None, pack_weight(weight)):
        torch.testing.assert_close(
            dispatcher(x, weight, bias, packed=packed), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5
        )


def test_profiles_all_kernels():
    dispatcher = GemmDispatcher.profile([SHAPE, (32, 8)], (1, 3), repeats=2)
    assert dispatcher.seconds.keys() == {SHAPE, (32, 8)}
    assert all(
        set(times) == set(KERNELS) and min(times.values()) > 0
        for table in dispatcher.seconds.values()
        for times in table.values()
    )
    assert list(dispatcher.seconds[SHAPE]) == [1, 3]
    assert dispatcher.machine == machine_of(torch.float32)


def test_a_saved_table_is_read_again(tmp_path):
    path = tmp_path / "folder" / "table.json"
    dispatcher = GemmDispatcher({SHAPE: SECONDS})
    dispatcher.save(path)
    assert GemmDispatcher.load(path).seconds == dispatcher.seconds
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]


def test_tuning_measures_once_a_machine_and_what_is_missing(monkeypatch):
    measured = []
    profile = GemmDispatcher.profile.__func__

    def counting(cls, shapes, *arguments, **options):
        measured.append(list(shapes))
        return profile(cls, shapes, *arguments, **options)

    monkeypatch.setattr(GemmDispatcher, "profile", classmethod(counting))
    first = GemmDispatcher.tuned([SHAPE], (1, 2), repeats=1)
    again = GemmDispatcher.tuned([SHAPE], (1, 2), repeats=1)
    assert again.seconds == first.seconds
    assert measured == [[SHAPE]]
    both = GemmDispatcher.tuned([SHAPE, (32, 8)], (1, 2), repeats=1)
    assert measured == [[SHAPE], [(32, 8)]]
    assert both.seconds[SHAPE] == first.seconds[SHAPE]
    GemmDispatcher.tuned([SHAPE], (1, 2, 4), repeats=1)
    assert measured[-1] == [SHAPE]
    GemmDispatcher.tuned([SHAPE], (1, 2), dtype=torch.float64, repeats=1)
    assert len(measured) == 4
    assert default_path(machine_of(torch.float32)) != default_path(machine_of(torch.float64))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        GemmDispatcher.tuned([SHAPE], (1, 2), repeats=1)
    finally:
        torch.set_num_threads(before)
    assert len(measured) == 5


def spoil_cut(document, text):
    return text[: len(text) // 2]


def spoil_times(document, text):
    document["seconds"][0]["flat"] *= 1.5
    return json.dumps(document)


def spoil_key(document, text):
    del document["seconds"][0]["flat"]
    return json.dumps(document)


def spoil_format(document, text):
    document["format"] = 99
    return json.dumps(document)


SPOILERS = [
    spoil_cut,
    spoil_times,
    spoil_key,
    spoil_format,
    lambda document, text: "",
    lambda document, text: "[1]",
    lambda document, text: '{"checksum": 1}',
]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_broken_file_is_refused_where_it_was_named_and_measured_anew_where_not(tmp_path, spoil):
    for path in (tmp_path / "named.json", default_path(machine_of(torch.float32))):
        GemmDispatcher({SHAPE: SECONDS}).save(path)
        text = path.read_text()
        path.write_text(spoil(json.loads(text), text))
        with pytest.raises(ValueError, match="no table of matrix products, or a broken one; delete it"):
            GemmDispatcher.load(path)
    with pytest.raises(ValueError, match=r"named\.json is no table"):
        GemmDispatcher.tuned([SHAPE], (1,), path=tmp_path / "named.json", repeats=1)
    tuned = GemmDispatcher.tuned([SHAPE], (1,), repeats=1)
    assert GemmDispatcher.load(path).seconds == tuned.seconds != {SHAPE: SECONDS}


def test_times_that_cannot_be_are_refused_even_with_a_right_checksum(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    for wrong in (-1.0, 0.0, math.inf, math.nan):
        dispatcher = GemmDispatcher({SHAPE: SECONDS})
        dispatcher.seconds[SHAPE][1]["flat"] = wrong
        dispatcher.save(path)
        with pytest.raises(ValueError, match="broken one"):
            GemmDispatcher.load(path)


def test_a_file_of_another_machine_is_refused(tmp_path):
    path = tmp_path / "table.json"
    machine = machine_of(torch.float32)
    for key, value in (("processor", "Z80"), ("threads", 99), ("torch", "1.0"), ("dtype", "torch.float16")):
        GemmDispatcher({SHAPE: SECONDS}, machine | {key: value}).save(path)
        expected = re.escape(f"{key}: {value!r} there, {machine[key]!r} here")
        with pytest.raises(ValueError, match=rf"measured elsewhere.*{expected}"):
            GemmDispatcher.load(path)
        with pytest.raises(ValueError, match="measured elsewhere"):
            GemmDispatcher.tuned([SHAPE], (1,), path=path, repeats=1)
    GemmDispatcher({SHAPE: SECONDS}, machine | {"threads": 99}).save(default_path(machine))
    assert GemmDispatcher.tuned([SHAPE], (1,), repeats=1).machine == machine


def test_a_folder_that_cannot_be_written_matters_only_where_it_was_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POSTERN_CACHE", str(tmp_path / "file"))
    assert GemmDispatcher.tuned([SHAPE], (1,), repeats=1).seconds
    with pytest.raises(OSError, match="file"):
        GemmDispatcher.tuned([SHAPE], (1,), path=tmp_path / "file" / "table.json", repeats=1)


def test_writers_at_the_same_time_leave_a_whole_file(tmp_path):
    path = tmp_path / "table.json"
    tables = [GemmDispatcher({(size, 16): SECONDS for size in range(1, count + 1)}) for count in (1, 60)]
    writers = [threading.Thread(target=lambda t=t: [t.save(path) for _ in range(30)]) for t in tables for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            assert len(GemmDispatcher.load(path).seconds) in (1, 60)
    assert [file.name for file in tmp_path.glob("*.*")] == ["table.json"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GemmDispatcher({SHAPE: {}}), r"with measurements, got \(48, 16\)"),
        (lambda: GemmDispatcher({(0, 1): SECONDS}), r"got \(0, 1\)"),
        (lambda: GemmDispatcher({SHAPE: {0: SECONDS[1]}}), "at least one row"),
        (lambda: GemmDispatcher({SHAPE: {1: {"gemv": 1.0}}}), "gemv, flat, vendor"),
        (lambda: GemmDispatcher.profile([SHAPE], ()), r"at least 1, got \[\]"),
        (lambda: GemmDispatcher.profile([(3, 0)], (1,)), r"got \(3, 0\)"),
        (lambda: GemmDispatcher.profile([SHAPE], (1,), repeats=0), "and 0"),
    ],
)
def test_rejects_impossible_tables(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        GemmDispatcher.load(tmp_path / "none.json")
