"""Robustness at test time: smoothed classifiers, their certificates, attacks on them, and logs."""

from fedrobust.smoothing.attacks import DDN, PGD, Adversary, parse_adversary, plain, smoothed
from fedrobust.smoothing.classifier import ABSTAIN, Certified, SmoothedClassifier
from fedrobust.smoothing.logs import Entry, Log, certified_accuracy, common, envelope, read_log
from fedrobust.smoothing.noise import Gaussian, RoundedGaussian

__all__ = [
    "ABSTAIN",
    "DDN",
    "PGD",
    "Adversary",
    "Certified",
    "Entry",
    "Gaussian",
    "Log",
    "RoundedGaussian",
    "SmoothedClassifier",
    "certified_accuracy",
    "common",
    "envelope",
    "parse_adversary",
    "plain",
    "read_log",
    "smoothed",
]
