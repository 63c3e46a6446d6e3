import numpy as np
import pytest
import torch
from scipy import sparse

from postern.claims import Run
from postern.data import MultiLabelText
from postern.errors import Unavailable
from postern.heads import DualEncoder, soft_topk
from postern.papers import dexml as paper

TINY = paper.Obvious(paper.Training(60, 32, (0.05,), (1e-2,)), 40, 5, 100, 50, 50, 16, 8)


def test_bisection_of_the_code_agrees_where_its_bracket_holds_the_root():
    scores = 5 * torch.randn(6, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(paper.bisected_topk(scores, 5), soft_topk(scores, 5), atol=1e-6, rtol=0)


def test_every_loss_and_pool_learns_and_starts_alike():
    run = Run(seed=3, scale="smoke")
    task = paper._obvious_task(TINY, run)
    untrained = paper.Training(0, 32)
    starts = [paper._train(task, loss, untrained, 0.05, 3e-3, run) for loss in paper.LOSSES.values()]
    for model in starts[1:]:
        for a, b in zip(starts[0].parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b)
    before = paper._metrics(starts[0], task, task.test)["P@5"]
    for name, loss in paper.LOSSES.items():
        if name != "ova_bce":
            model = paper._train(task, loss, TINY.training, 0.05, 1e-2, run)
            assert paper._metrics(model, task, task.test)["P@5"] > before + 0.15, name
    for negatives in (0, 2):
        model = paper._train(task, paper.LOSSES["decoupled"], TINY.training, 0.05, 1e-2, run, negatives=negatives)
        assert paper._metrics(model, task, task.test)["P@5"] > before + 0.15, negatives


def test_gradient_caching_changes_nothing():
    run = Run(seed=0, scale="smoke")
    task = paper._obvious_task(TINY, run)
    settings = [paper.Training(5, 32), paper.Training(5, 32, chunk=7)]
    models = [paper._train(task, paper.LOSSES["decoupled"], each, 0.1, 1e-3, run) for each in settings]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_best_setting_is_chosen_on_validation_queries(monkeypatch):
    run = Run(seed=0, scale="smoke")
    task = paper._obvious_task(TINY, run)
    values = {(0.1, 1e-3): 0.3, (0.1, 3e-3): 0.5, (0.2, 1e-3): 0.4, (0.2, 3e-3): 0.1}
    monkeypatch.setattr(paper, "_train", lambda task, loss, training, tau, rate, *args, **options: (tau, rate))
    monkeypatch.setattr(
        paper,
        "_metrics",
        lambda model, task, queries: {"P@1": values[model] if queries is task.validation else 1 - values[model]},
    )
    tuned = paper._tune(task, None, paper.Training(1, 1, (0.1, 0.2)), "P@1", run, "")
    assert (tuned.tau, tuned.learning_rate, tuned.validation, tuned.test) == (0.1, 3e-3, 0.5, {"P@1": 0.5})


def test_texts_are_divided_with_their_labels():
    excluded = torch.tensor([1, 3]), torch.tensor([0, 1])
    whole = MultiLabelText(
        tuple("abcde"), ("x", "y", "z"), torch.tensor([0, 1, 1, 2, 3, 4]), torch.tensor([0, 1, 2, 2, 0, 1]), excluded
    )
    train, validation = paper._divide(whole, 0.4, torch.Generator().manual_seed(0))
    assert (len(train), len(validation)) == (3, 2)

    def pairs(data, rows, columns):
        return {(data.texts[r], c) for r, c in zip(rows.tolist(), columns.tolist(), strict=True)}

    found = [pairs(part, part.rows, part.columns) for part in (train, validation)]
    assert found[0] | found[1] == pairs(whole, whole.rows, whole.columns)
    assert len(found[0]) + len(found[1]) == 6
    assert pairs(train, *train.excluded) | pairs(validation, *validation.excluded) == pairs(whole, *excluded)


def test_kept_bytes_rise_and_fall():
    kept = paper._KeptBytes()
    x = torch.randn(1000, requires_grad=True)
    with kept:
        y = x.exp()  # keeps its result
        z = y.sin().sum()
        assert kept.now == kept.most == 8000
        z.backward()
    del y, z
    assert kept.now == 0
    assert kept.most == 8000


def test_the_full_scale_runs_in_miniature(tmp_path, monkeypatch):
    """A folder in the paper's layout, and a model of Hugging Face with its tokenizer, as from the Hub."""
    transformers = pytest.importorskip("transformers")
    words = ["red", "green", "blue", "old", "new", "fish", "bird", "tree", "rose", "moon", "the", "a", "of"]
    rng = np.random.default_rng(0)
    data = tmp_path / "data" / "EURLex-4K"
    (data / "raw").mkdir(parents=True)
    labels = [f"{a} {b}" for a in words[:5] for b in words[5:10]]
    (data / "raw" / "Y.txt").write_text("\n".join(labels) + "\n")
    for part, count in (("trn", 40), ("tst", 20)):
        named = rng.integers(0, 25, (count, 2))
        texts = [f"the {labels[i]} of a {labels[j]}" for i, j in named]
        (data / "raw" / f"{part}_X.txt").write_text("\n".join(texts) + "\n")
        matrix = np.zeros((count, 25))
        np.put_along_axis(matrix, named, 1.0, axis=1)
        sparse.save_npz(data / f"Y.{part}.npz", sparse.csr_matrix(matrix))
    model = tmp_path / "model"
    config = transformers.DistilBertConfig(vocab_size=20, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    transformers.DistilBertModel(config).save_pretrained(model)
    loaded = DualEncoder.from_hugging_face(str(model))
    torch.testing.assert_close(
        loaded.encoder.state_dict(), transformers.DistilBertModel.from_pretrained(model).state_dict()
    )
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(model)

    training = paper.Training(20, 16, (0.05,), (1e-2,), warm_up=0.1, weight_decay=0.01, chunk=4)
    with pytest.raises(Unavailable, match="could not be loaded"):
        paper._real_task(paper.RealTexts(training, encoder=str(tmp_path / "nothing")), Run(seed=0, scale="full"))
    small = paper.RealTexts(training, folder="EURLex-4K", encoder=str(model), words=12, losses=("decoupled", "coupled"))
    run = Run(seed=0, scale="full")
    monkeypatch.delenv("POSTERN_DATA", raising=False)
    with pytest.raises(Unavailable, match="POSTERN_DATA"):
        paper.decoupling_helps_on_real_texts(small, run)
    monkeypatch.setenv("POSTERN_DATA", str(tmp_path / "data"))
    metrics = paper.decoupling_helps_on_real_texts(small, run)
    assert set(metrics) == {f"{name}_{metric}" for name in ("decoupled", "coupled") for metric in paper.REAL_METRICS}
    assert metrics["decoupled_R@20"] > 0.8  # of 25 labels
    assert set(paper.more_negatives_help(small, run)) >= {"all_P@1", "hard_P@1", "in_batch_P@1"}
