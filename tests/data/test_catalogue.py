import pytest

from postern.data import catalogue, fetch, load, locate


def test_names_are_unique_and_every_split_has_a_layout() -> None:
    names = [data_set.name for data_set in catalogue()]
    assert len(set(names)) == len(names)
    for data_set in catalogue():
        assert data_set.splits
        assert data_set.licence
        assert data_set.source.startswith("https://")
        assert data_set.embedded == (data_set.repository is None)
        if not data_set.embedded:
            assert data_set.files.keys() == data_set.splits.keys()
            for layouts in data_set.files.values():
                assert layouts[-1].revision is not None, f"{data_set.name} cannot be fetched"


def test_class_names_are_distinct() -> None:
    sizes = {"uoft-cs/cifar100": 100}
    for data_set in catalogue():
        if data_set.kind == "images" and not data_set.embedded:
            assert len(set(data_set.class_names)) == len(data_set.class_names) == sizes.get(data_set.name, 10)


@pytest.mark.parametrize(
    ("name", "near"),
    [("mnist", "ylecun/mnist"), ("cifar-10", "uoft-cs/cifar10"), ("digit", "digits"), ("wikitxt", "wikitext")],
)
def test_an_unknown_name_gives_the_nearest(name: str, near: str) -> None:
    for look_up in (lambda: load(name, "train"), lambda: locate(name), lambda: fetch(name)):
        with pytest.raises(ValueError, match=f"no data set is called '{name}'; did you mean .*{near}"):
            look_up()


def test_a_name_like_no_other_gives_all() -> None:
    with pytest.raises(ValueError, match=r"known: .*digits.*ylecun/mnist.*ptb"):
        load("zzzzzz", "train")


def test_an_unknown_split_gives_the_nearest_and_all() -> None:
    with pytest.raises(ValueError, match=r"'ptb' has no split 'valid'; did you mean 'validation'\? it has: train, val"):
        load("ptb", "valid")


def test_an_embedded_set_cannot_be_fetched() -> None:
    with pytest.raises(ValueError, match="nothing to fetch"):
        fetch("digits")


def test_data_sets_can_be_keys() -> None:
    assert len(dict.fromkeys(catalogue(), 1)) == len(catalogue())
