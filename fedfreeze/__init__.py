"""fedfreeze: federated learning under enforced memory caps, emulated on PyTorch distributed."""

# As type checkers know it from `typing`, which is not imported here: this file is read before __main__.py has put the
# search path right, and a user may have a typing.py.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from torch import nn

__version__ = "0.1.0"


def load_model(run_dir: str) -> "nn.Module":
    """Return the trained network of a finished run, in eval mode.

    Its attribute `normalisation` holds the mean and std a channel with which images in [0, 1] must be normalised,
    `class_names` the names of the classes, by label; None where the data had none.
    Raises FedfreezeError if the run is not finished.
    """
    from fedfreeze.run.deploy import load_model as load

    return load(run_dir)
