"""The few small reference networks that the experiments share."""

from postern.nets.agarap import AgarapCNN, initialize_truncated
from postern.nets.bag_of_words import BagOfWords
from postern.nets.convnet import ConvNet
from postern.nets.detector import GridDetector
from postern.nets.evaluation import evaluating
from postern.nets.expert_language_model import ExpertLanguageModel, ExpertLanguageModelLayer
from postern.nets.expert_translation_model import ExpertTranslationLayer, ExpertTranslationModel
from postern.nets.language_model import (
    LanguageModel,
    LanguageModelCache,
    consecutive_windows,
    language_model_loss,
    next_token_loss,
    random_windows,
    rate_at,
    train_language_model,
)
from postern.nets.mlp import MLP
from postern.nets.nalaformer import NALAFORMER_SIZES, NaLaFormer, NaLaFormerBlock, NaLaFormerSize
from postern.nets.normalize import Normalize
from postern.nets.residual_mlp import ResidualMLP
from postern.nets.resnet import ResNet, resnet18, resnet34
from postern.nets.token_transformer import TokenTransformer
from postern.nets.vector_transformer import VectorTransformer

__all__ = [
    "MLP",
    "NALAFORMER_SIZES",
    "AgarapCNN",
    "BagOfWords",
    "ConvNet",
    "ExpertLanguageModel",
    "ExpertLanguageModelLayer",
    "ExpertTranslationLayer",
    "ExpertTranslationModel",
    "GridDetector",
    "LanguageModel",
    "LanguageModelCache",
    "NaLaFormer",
    "NaLaFormerBlock",
    "NaLaFormerSize",
    "Normalize",
    "ResNet",
    "ResidualMLP",
    "TokenTransformer",
    "VectorTransformer",
    "consecutive_windows",
    "evaluating",
    "initialize_truncated",
    "language_model_loss",
    "next_token_loss",
    "random_windows",
    "rate_at",
    "resnet18",
    "resnet34",
    "train_language_model",
]
