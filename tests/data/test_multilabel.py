import numpy as np
import pytest
import torch
from scipy import sparse

from postern.data import DataUnavailable, InvalidData, MultiLabelText, ObviousLabels, Vocabulary, read_xmc_folder

NOTHING = torch.empty(0, dtype=torch.long)


def write_folder(folder, matrix, filtered=()):
    (folder / "raw").mkdir(parents=True)
    (folder / "raw" / "trn_X.txt").write_text("".join(f" text\x0c {k}\n" for k in range(len(matrix))))
    (folder / "raw" / "Y.txt").write_text("".join(f"label {k}\n" for k in range(matrix.shape[1])))
    sparse.save_npz(folder / "Y.trn.npz", sparse.csr_matrix(matrix))
    (folder / "filter_labels_train.txt").write_text("".join(f"{row} {label}\n" for row, label in filtered))


def test_a_folder_of_the_papers_layout_is_read(tmp_path):
    matrix = np.array([[0, 1.0, 0], [1, 1, 0], [0, 0, 0.5]])
    write_folder(tmp_path / "Set-1", matrix, [(1, 0), (2, 1)])
    data = read_xmc_folder(tmp_path / "Set-1", "train")
    assert data.texts == ("text\x0c 0", "text\x0c 1", "text\x0c 2")
    assert data.labels == ("label 0", "label 1", "label 2")
    assert list(zip(data.rows.tolist(), data.columns.tolist(), strict=True)) == [(0, 1), (1, 1), (2, 2)]
    assert [part.tolist() for part in data.excluded] == [[1, 2], [0, 1]]
    assert repr(data) == "MultiLabelText(3 texts of Set-1, train, 3 labels, 3 pairs)"


def test_an_empty_filter_excludes_nothing(tmp_path):
    write_folder(tmp_path, np.eye(2))
    assert [len(part) for part in read_xmc_folder(tmp_path, "train").excluded] == [0, 0]


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    with pytest.raises(ValueError, match="split must be train or test, got 'dev'"):
        read_xmc_folder(tmp_path, "dev")
    with pytest.raises(DataUnavailable, match=r"trn_X\.txt.*Y\.trn\.npz not found"):
        read_xmc_folder(tmp_path, "train")
    write_folder(tmp_path, np.eye(2))
    sparse.save_npz(tmp_path / "Y.trn.npz", sparse.csr_matrix((2, 3)))
    with pytest.raises(InvalidData, match=r"shape \(2, 3\); expected \(2, 2\)"):
        read_xmc_folder(tmp_path, "train")


@pytest.mark.parametrize(
    ("rows", "columns", "excluded", "message"),
    [
        ([0, 2], [0, 0], (NOTHING, NOTHING), r"positives: texts lie in 0\.\.1, got 0\.\.2"),
        ([0], [3], (NOTHING, NOTHING), r"positives: labels lie in 0\.\.2, got 3\.\.3"),
        ([0], [0, 1], (NOTHING, NOTHING), "positives are two int64 tensors of one length"),
        ([0], [0], (torch.tensor([0]), torch.tensor([-1])), r"excluded: labels lie in 0\.\.2, got -1\.\.-1"),
    ],
)
def test_wrong_pairs_are_refused(rows, columns, excluded, message):
    with pytest.raises(ValueError, match=message):
        MultiLabelText(("a", "b"), ("x", "y", "z"), torch.tensor(rows), torch.tensor(columns), excluded)


def test_no_texts_are_refused():
    with pytest.raises(ValueError, match="got 0 and 1"):
        MultiLabelText((), ("x",), NOTHING, NOTHING, (NOTHING, NOTHING))


def test_a_vocabulary_numbers_words_by_frequency():
    words = Vocabulary(["The cat, the dog.", "the CAT 7"], min_count=2)
    assert words.words == ("<padding>", "<other>", "the", "cat")
    assert words.encode(["a cat: the the", "", "cat"], 3).tolist() == [[1, 3, 2], [1, 0, 0], [3, 0, 0]]
    assert len(Vocabulary(["b a b 7"], 1)) == 5
    with pytest.raises(ValueError, match="min_count must be at least 1, got 0"):
        Vocabulary([], 0)
    with pytest.raises(ValueError, match="got 0 and 3"):
        words.encode([], 3)


def test_obvious_labels_are_named_and_the_others_are_of_the_topic():
    generator = torch.Generator().manual_seed(0)
    world = ObviousLabels(generator, num_labels=60, num_topics=6, num_guesses=4)
    assert world.tokens.shape == (60, 3)
    drawn = world.queries(500, generator)
    assert int(drawn.tokens.max()) < world.num_tokens
    assert int(drawn.tokens.min()) > 0
    own = {token: label for label, token in enumerate(world.tokens[:, 0].tolist())}
    for row in range(500):
        labels = drawn.columns[drawn.rows == row].tolist()
        assert own[int(drawn.tokens[row, 0])] == drawn.obvious[row] == labels[0]
        assert len(set(labels)) == len(labels)
        assert set(world.topics[labels].tolist()) == {int(world.topics[labels[0]])}
        assert len(labels) == min(5, int((world.topics == world.topics[labels[0]]).sum()))
    # No word of a query but the obvious label's own is a label's; the guesses are uniform over the topic.
    assert not set(drawn.tokens[:, 1:].unique().tolist()) & set(world.tokens.unique().tolist())
    is_first_topic = world.topics[drawn.obvious] == world.topics[0]
    shares = [
        (drawn.columns[is_first_topic[drawn.rows]] == label).sum().item()
        for label in range(60)
        if world.topics[label] == world.topics[0]
    ]
    assert max(shares) < 2.5 * min(shares)


def test_wrong_worlds_are_refused():
    generator = torch.Generator()
    with pytest.raises(ValueError, match="got 0, 50, 4"):
        ObviousLabels(generator, num_labels=0)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        ObviousLabels(generator, 5, 2).queries(0, generator)
