import warnings

__version__ = "0.1.0"

# fastai compiles a little script at import and torch says it should not: nothing that a user could mend
warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
