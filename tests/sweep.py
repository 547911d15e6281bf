"""What is asked of every backbone, on the meta device: shapes are computed, numbers are not, so the largest model takes no memory."""
import torch

from mstoolkit.models.backbone import TimmStages, canonical_key, check_size
from mstoolkit.models.fusion import MultiScaleModel, heads
from mstoolkit.models.split import stage_splitter


def check_maps(body, size):
    "The backbone gives the maps it promises for images of `size`; return them."
    xs = body(torch.empty(2, 3, *size))
    keys = [canonical_key(k) for k in body.net.state_dict()]
    if len(set(keys)) < len(keys): raise AssertionError('two tensors have one canonical name')
    if [x.shape[1] for x in xs] != body.channels: raise AssertionError(f'maps {[tuple(x.shape) for x in xs]}, promised channels {body.channels}')
    if not all(a.shape[2] >= b.shape[2] and a.shape[3] >= b.shape[3] for a, b in zip(xs, xs[1:])): raise AssertionError('maps grow with depth')
    return xs


def check_split(model):
    "Every parameter is in exactly one group and no group is empty; return the number of groups."
    groups = stage_splitter(model)
    covered = sorted(id(p) for g in groups for p in g) == sorted(id(p) for p in model.parameters())
    if not covered: raise AssertionError('split does not cover every parameter once')
    if not all(groups): raise AssertionError('split has an empty group')
    if len(groups) < 4: raise AssertionError(f'split has {len(groups)} groups only')
    return len(groups)


def check_backbone(name, n_out=7, sizes=True, device='meta'):
    "Build `name` with both fusion heads, run it, split it; return what it is like. `sizes`: try an odd image size too."
    with torch.device(device), torch.no_grad():
        body = TimmStages(name, pretrained=False).eval()
        size = check_size(body, body.input_size)
        try: xs = check_maps(body, size)
        except RuntimeError as e:
            if 'meta tensors' in str(e): return check_backbone(name, n_out, sizes, 'cpu')  # it looks at numbers, so there must be some
            raise
        for head in ('pyramid', 'gated'):
            model = MultiScaleModel(body, heads[head](body.channels, n_out))
            if model[1](xs).shape != (2, n_out): raise AssertionError(f'{head}: logits {tuple(model[1](xs).shape)}')
            n_groups = check_split(model)
        any_size = not body.fixed_size and (not sizes or takes_odd_sizes(body))
    return dict(strides=body.strides, channels=body.channels, groups=n_groups, fixed=body.fixed_size, any_size=any_size, last=body.channels_last,
                device=device)


def takes_odd_sizes(body):
    (h, w), s = body.input_size, max(body.strides)
    try: check_maps(body, (h + s//2 + 1, w + 5))
    except (AssertionError, RuntimeError, ValueError): return False
    return True
