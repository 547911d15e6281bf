import warnings

__version__ = "0.1.0"

# fastai compiles a little script at import and torch says it should not: nothing that a user could mend
warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
# the hub's client looks for a widget in notebooks, which nothing here uses
warnings.filterwarnings("ignore", message="IProgress not found")
