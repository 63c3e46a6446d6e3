"""Data sets: embedded, local or from the Hub, by `load`; a user's own, by `load_own`; generators of synthetic ones."""

from postern.data._catalogue import DataSet, catalogue
from postern.data.algorithmic import AlgorithmicSplit, modular_arithmetic, sparse_parity
from postern.data.associative_recall import PairedRecall, Recall, multi_query_recall, paired_recall
from postern.data.augmentation import shift_and_mirror
from postern.data.backcopy import BigramBackcopy
from postern.data.detections import Detections, simulated_detections
from postern.data.errors import DataUnavailable, InvalidData
from postern.data.kinds import Images, Table, Text
from postern.data.loading import ImageName, Location, TableName, TextName, fetch, load, locate, verify
from postern.data.multilabel import MultiLabelText, read_xmc_folder
from postern.data.obvious_labels import ObviousLabels, ObviousQueries
from postern.data.own import load_own, load_own_splits
from postern.data.scenes import Scenes, digit_scenes
from postern.data.see_also import see_also
from postern.data.segment_copy import segment_copies
from postern.data.splitting import split_rows
from postern.data.synthetic_languages import SyntheticLanguages, TranslationPairs
from postern.data.transduction import ReversedDigits, SpelledNumbers
from postern.data.words import Vocabulary

__all__ = [
    "AlgorithmicSplit",
    "BigramBackcopy",
    "DataSet",
    "DataUnavailable",
    "Detections",
    "ImageName",
    "Images",
    "InvalidData",
    "Location",
    "MultiLabelText",
    "ObviousLabels",
    "ObviousQueries",
    "PairedRecall",
    "Recall",
    "ReversedDigits",
    "Scenes",
    "SpelledNumbers",
    "SyntheticLanguages",
    "Table",
    "TableName",
    "Text",
    "TextName",
    "TranslationPairs",
    "Vocabulary",
    "catalogue",
    "digit_scenes",
    "fetch",
    "load",
    "load_own",
    "load_own_splits",
    "locate",
    "modular_arithmetic",
    "multi_query_recall",
    "paired_recall",
    "read_xmc_folder",
    "see_also",
    "segment_copies",
    "shift_and_mirror",
    "simulated_detections",
    "sparse_parity",
    "split_rows",
    "verify",
]
