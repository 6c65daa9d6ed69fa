"""What a federation trains, and how one client trains it."""

from fedrobust.training.central import Course, Progress, labelled, train
from fedrobust.training.cohort import updates
from fedrobust.training.local import (
    FREE,
    Evaluation,
    Learner,
    Leash,
    Poison,
    Shared,
    evaluate,
    own_learner,
    root_learner,
)
from fedrobust.training.models import CNN, MLP, LeNet, Model, ResNet, Softmax, parse_model
from fedrobust.training.objectives import (
    AdversarialTraining,
    Consistency,
    CrossEntropy,
    GaussianAugmentation,
    Objective,
    SmoothAdv,
    Trades,
    parse_objective,
)
from fedrobust.training.task import Task, client_name
from fedrobust.training.vectors import Manifest, load_vector, manifest, split_vector, to_vector

__all__ = [
    "CNN",
    "FREE",
    "MLP",
    "AdversarialTraining",
    "Consistency",
    "Course",
    "CrossEntropy",
    "Evaluation",
    "GaussianAugmentation",
    "LeNet",
    "Learner",
    "Leash",
    "Manifest",
    "Model",
    "Objective",
    "Poison",
    "Progress",
    "ResNet",
    "Shared",
    "SmoothAdv",
    "Softmax",
    "Task",
    "Trades",
    "client_name",
    "evaluate",
    "labelled",
    "load_vector",
    "manifest",
    "own_learner",
    "parse_model",
    "parse_objective",
    "root_learner",
    "split_vector",
    "to_vector",
    "train",
    "updates",
]
