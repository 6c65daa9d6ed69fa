"""What a federation trains, and how one client trains it."""

from fedrobust.training.cohort import updates
from fedrobust.training.local import FREE, Evaluation, Learner, Leash, Poison, Shared, evaluate
from fedrobust.training.models import CNN, MLP, Model, ResNet, Softmax, parse_model
from fedrobust.training.task import Task, client_name
from fedrobust.training.vectors import Manifest, load_vector, manifest, split_vector, to_vector

__all__ = [
    "CNN",
    "FREE",
    "MLP",
    "Evaluation",
    "Learner",
    "Leash",
    "Manifest",
    "Model",
    "Poison",
    "ResNet",
    "Shared",
    "Softmax",
    "Task",
    "client_name",
    "evaluate",
    "load_vector",
    "manifest",
    "parse_model",
    "split_vector",
    "to_vector",
    "updates",
]
