"Which backbone is taken: by fake stopwatches, planted weights and the command on a tiny folder."
import re
from pathlib import Path

import pytest
import timm
import torch

import mstoolkit.models.candidates as cand
from mstoolkit.cli import main
from mstoolkit.models.candidates import (Candidate, Ranked, Weights, candidates, choice_told, format_backbones, rank_backbones,
                                         take_backbone, weights_at_hand, weights_told)

LITE, R18, R50, NANO = 'tf_efficientnet_lite0.in1k', 'resnet18.a1_in1k', 'resnet50.a1_in1k', 'convnext_nano.in12k_ft_in1k'


# the table
@pytest.mark.parametrize('name', candidates)
def test_timm_has_the_candidate(name):
    c, cfg = candidates[name], timm.models.get_pretrained_cfg(name)
    assert name in timm.list_pretrained() and cfg.has_weights and cfg.num_classes == 1000
    with torch.device('meta'): n = sum(p.numel() for p in timm.create_model(name).parameters())
    assert c.params == pytest.approx(n/1e6, abs=.01)
    assert c.px == max(c.px, cfg.input_size[1]) and 60 < c.top1 < 92 and c.gmacs > 0


def test_the_table_has_one_row_an_architecture_over_three_orders_of_cost():
    archs, costs = [n.partition('.')[0] for n in candidates], [c.gmacs for c in candidates.values()]
    assert len(set(archs)) == len(archs) and 18 <= len(archs) <= 30
    assert costs == sorted(costs) and max(costs) > 1000*min(costs)
    assert candidates[R18].gmacs_at(112) == candidates[R18].gmacs/4


@pytest.mark.parametrize('size', [32, 160])
@pytest.mark.parametrize('name', candidates)
def test_every_candidate_takes_multiples_of_32(name, size): # and so `_sketch` need not try those
    with torch.device('meta'): model = cand.multiscale_model(name, 'gated', 5, pretrained=False, img_size=size)
    assert model(torch.empty(2, 3, size, size, device='meta')).shape == (2, 5)


# weights
@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty cache, and a hub that refuses at once; `asked` counts how often it was."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path/'torch'))
    constants.asked = []
    monkeypatch.setattr(cand, '_answers', cand.cache(lambda url: constants.asked.append(url) or constants.up))
    monkeypatch.setattr(constants, 'up', False, raising=False)
    yield constants
    del constants.asked


@pytest.mark.parametrize('file,found', [
    ('tf_efficientnet_lite0.in1k.safetensors', True), ('tf_efficientnet_lite0.pth', True), ('TF-EfficientNet-Lite0.PT', True),
    ('tf_efficientnet_lite0-0aa007d2.pth', True), # as its authors called it
    ('efficientnet_lite0.pth', False), ('tf_efficientnet_lite0.bin', False), ('tf_efficientnet_lite01.pth', False),
    ('tf_efficientnet_lite0.in21k.pth', False), ('model.safetensors', False)])
def test_a_file_is_found_by_its_name(file, found, hub, tmp_path):
    (tmp_path/'w').mkdir()
    (tmp_path/'w'/file).touch()
    w = weights_at_hand(LITE, tmp_path/'w')
    assert (w.how, Path(w.where).name) == ('file', file) if found else w.how == 'none'


def test_the_fuller_name_is_taken_then_the_safer_format(hub, tmp_path):
    names = ['tf_efficientnet_lite0.in1k.safetensors', 'tf_efficientnet_lite0.in1k.pth', 'tf_efficientnet_lite0-0aa007d2.pth',
             'tf_efficientnet_lite0.safetensors', 'tf_efficientnet_lite0.pt']
    for n in names: (tmp_path/n).touch()
    for n in names:
        assert Path(weights_at_hand(LITE, tmp_path).where).name == n
        (tmp_path/n).unlink()
    with pytest.raises(FileNotFoundError, match='no folder of weights'): weights_at_hand(LITE, tmp_path/'nowhere')


def test_cache_hub_and_none(hub, tmp_path, monkeypatch):
    assert weights_at_hand(R18) == Weights('none', f'{hub.ENDPOINT} does not answer') and not weights_at_hand(R50)
    assert len(hub.asked) == 1 # for both
    snapshot = tmp_path/'hub'/f'models--timm--{R50}'
    for d in ('refs', 'snapshots/0'): (snapshot/d).mkdir(parents=True)
    (snapshot/'refs'/'main').write_text('0')
    (snapshot/'snapshots'/'0'/'model.safetensors').touch()
    assert weights_at_hand(R50) == Weights('cache', str(snapshot/'snapshots'/'0'/'model.safetensors'))
    (tmp_path/'torch'/'checkpoints').mkdir(parents=True)
    (tmp_path/'torch'/'checkpoints'/'resnet18_a1_0-d63eafa0.pth').touch()
    assert weights_at_hand(R18).how == 'cache'
    monkeypatch.setattr(hub, 'up', True)
    cand._answers.cache_clear()
    assert weights_at_hand(LITE).how == 'hub' and LITE in weights_at_hand(LITE).where
    monkeypatch.setattr(hub, 'HF_HUB_OFFLINE', True)
    assert 'HF_HUB_OFFLINE' in weights_at_hand(LITE).where and weights_at_hand(R50) and len(hub.asked) == 2


# the choice
def row(name, epochs, how='hub', timed=True, passed_over=''):
    return Ranked(candidates[name], 10.*epochs, timed, epochs, Weights(how, 'why'), passed_over or ('no weights' if how == 'none' else ''))


@pytest.mark.parametrize('rows,taken', [
    ([row(LITE, 30), row(NANO, 9), row(R50, 12)], NANO), # the most accurate of those that reach 8
    ([row(LITE, 30), row(NANO, 7.9), row(R50, 12)], R50),
    ([row(LITE, 30), row(NANO, 9, 'none'), row(R50, 12)], R50),
    ([row(LITE, 30), row(NANO, 9, passed_over='no memory'), row(R18, 12)], LITE),
    ([row(R18, 2), row(LITE, 3), row(NANO, 1)], LITE), # none reaches it: the fastest
    ([row(LITE, 30), row(NANO, 9, timed=False)], NANO), # an estimate counts
    ([row(LITE, 30, 'none'), row(NANO, 9, 'none')], None),
    ([], None)])
def test_which_is_taken(rows, taken):
    got = take_backbone(rows, 8)
    assert (got and got.candidate.name) == taken
    if rows:
        assert (taken or 'from scratch') in choice_told(rows, 1200, 8) and '\n' not in choice_told(rows, 1200, 8)
        marked = [l for l in format_backbones(rows, 8).splitlines() if l.startswith('>')]
        assert [l.split()[1] for l in marked] == ([taken] if taken else [])


def test_it_says_how_to_get_what_would_be_better():
    rows = [row(LITE, 30), row(R50, 9, 'none'), row(NANO, 4, 'none')]
    said = weights_told(rows, 8)
    assert f'model.safetensors from https://huggingface.co/timm/{R50}' in said and f'{R50}.safetensors' in said and '--weights-dir' in said
    assert weights_told([row(LITE, 30), row(R18, 9, 'none')], 8) == ''
    assert R50 in weights_told([row(R50, 9, 'none')], 8)


class Stopwatch:
    "Networks of made-up speed, and a clock that goes on as they are timed."
    def __init__(self, monkeypatch, speeds, ways=1):
        self.speeds, self.now, self.timed = speeds, 0., []
        monkeypatch.setattr(cand, 'perf_counter', lambda: self.now)
        monkeypatch.setattr(cand, 'ways', lambda *_: ['a way']*ways)
        monkeypatch.setattr(cand, 'time_backbone', self.time)
        monkeypatch.setattr(cand, 'keep_freed_memory', lambda: None)

    def time(self, name, *, n, bs, size, rounds, **_):
        images, speed = min(bs, max(n, -(-n*224*224//size**2))), self.speeds[name]
        if isinstance(speed, Exception): raise speed
        self.now += images*(rounds + 1)/speed
        self.timed.append(name)
        return speed


@pytest.fixture
def folder(tmp_path, hub):
    "Weights of everything."
    (tmp_path/'all').mkdir()
    for n in candidates: (tmp_path/'all'/f'{n}.safetensors').touch()
    return tmp_path/'all'


def ranked(folder, seconds=1200, n_train=1000, **kw):
    return {o.candidate.name: o for o in rank_backbones(n_train, 10, size=224, bs=32, seconds=seconds, weights_dir=folder, **kw)}


def steady(rate): return {n: rate/c.gmacs_at(224) for n, c in candidates.items()} # so many gmacs a second, whatever the network


@pytest.mark.parametrize('seconds', [30, 120, 1200, 12_000])
def test_the_time_for_timing_is_kept(seconds, folder, monkeypatch):
    watch = Stopwatch(monkeypatch, steady(60), ways=4)
    rows = ranked(folder, seconds)
    assert watch.now <= max(.04*seconds, 1) and watch.timed[0] == 'mobilenetv3_small_100.lamb_in1k'
    assert [n for n, o in rows.items() if o.timed] == watch.timed
    for o in rows.values(): assert o.images_s == pytest.approx(60/o.candidate.gmacs_at(224)) # the estimates, too
    assert rows[LITE].epochs == pytest.approx(rows[LITE].images_s*seconds*.75/1000)


def test_nothing_is_timed_that_could_not_be_taken(folder, monkeypatch):
    watch = Stopwatch(monkeypatch, steady(60))
    rows = ranked(folder, 300, min_epochs=8)
    taken = take_backbone(list(rows.values()), 8).candidate
    assert taken.name in watch.timed
    at = watch.timed.index(taken.name)
    assert [candidates[n].top1 for n in watch.timed[:at+1]] == sorted(candidates[n].top1 for n in watch.timed[:at+1])
    assert R18 not in watch.timed and 'eva02_base_patch14_448.mim_in22k_ft_in22k_in1k' not in watch.timed
    for f in folder.glob('edgenext*'): f.unlink()
    watch.timed.clear()
    assert ranked(folder, 300)['edgenext_small.usi_in1k'].passed_over == 'no weights'
    assert 'edgenext_small.usi_in1k' not in watch.timed


def test_every_candidate_is_timed_when_asked(folder, monkeypatch):
    watch = Stopwatch(monkeypatch, steady(60))
    rows = ranked(None, 60, every=True)
    assert len(watch.timed) == len(candidates) and all(o.timed and o.passed_over == 'no weights' for o in rows.values())
    slow = Stopwatch(monkeypatch, steady(1)) # of which no two images of the largest go through in half a minute
    rows = ranked(None, 60, every=True)
    largest = max(candidates.values(), key=lambda c: c.gmacs_at(224)).name
    assert 3 < len(slow.timed) < len(candidates) and largest not in slow.timed and slow.now <= 30*len(slow.timed)
    assert not rows[largest].timed and rows[largest].images_s == pytest.approx(1/candidates[largest].gmacs_at(224))


def test_a_folder_without_weights_is_a_mistake(folder):
    for f in folder.iterdir(): f.rename(f.with_name(f'my {f.name}'))
    with pytest.raises(ValueError, match='all.*has no weights of any candidate: name files as timm names the networks, such as .*[.]safetensors'): ranked(folder)
    next(folder.iterdir()).rename(folder/f'{LITE}.pth')
    assert [n for n, o in ranked(folder, 1200, names=[LITE, R18]).items() if o.weights] == [LITE]


def test_what_fails_is_passed_over_with_a_word(folder, monkeypatch):
    speeds = steady(60) | {'mobilenetv3_small_100.lamb_in1k': ValueError('8 px are too few'), LITE: RuntimeError('CUDA out of memory')}
    Stopwatch(monkeypatch, speeds)
    rows = ranked(folder)
    first = rows['mobilenetv3_small_100.lamb_in1k']
    assert (first.passed_over, first.images_s, first.timed) == ('not at 224 px', 0, False) and rows[LITE].passed_over == 'no memory'
    assert take_backbone(list(rows.values()))
    Stopwatch(monkeypatch, speeds | {LITE: RuntimeError('a mistake of ours')})
    with pytest.raises(RuntimeError, match='of ours'): ranked(folder)


def test_too_small_for_most(folder, monkeypatch):
    fails = lambda name: ValueError('stride 32') if not re.match('vit|eva02', name) else 10.
    Stopwatch(monkeypatch, {n: fails(n) for n in candidates})
    names = [R18, 'vit_small_patch16_224.augreg_in21k_ft_in1k']
    rows = rank_backbones(1000, 10, size=28, bs=32, seconds=1200, weights_dir=folder, names=names)
    assert [o.passed_over for o in rows] == ['not at 28 px', '']


def test_nothing_random_moves(hub):
    before = torch.get_rng_state()
    assert cand.time_backbone('test_resnet', 3, size=32, bs=4, rounds=1) > 0
    assert torch.equal(before, torch.get_rng_state())


# the command
@pytest.fixture
def tiny_candidate(monkeypatch):
    monkeypatch.setitem(candidates, 'test_resnet.r160_in1k', Candidate('test_resnet.r160_in1k', 42.8, 160, .47, .1))
    return ['--minutes', '.05', '--size', '32', '--bs', '8', '--device', 'cpu', '--only', 'test_resnet.r160_in1k']


@pytest.mark.parametrize('more', [[], ['--quick']])
def test_the_command(more, tiny_candidate, hub, image_folder, tmp_path, capsys):
    (tmp_path/'test_resnet.safetensors').touch()
    for f in image_folder.rglob('*.png'): f.write_bytes(b'') # nothing is decoded
    assert main(['backbones', str(image_folder), *tiny_candidate, '--weights-dir', str(tmp_path), *more]) == 0
    out = capsys.readouterr().out
    assert '24 training images of 3 classes, 32 px, batches of 8, gated head, cpu, 0.05 min' in out
    assert re.search(r'^> test_resnet\.r160_in1k +0\.5M +42\.8 +[\d.,]+ +[\d.,]+  file$', out, re.M)
    assert '--backbone auto takes test_resnet.r160_in1k' in out and all(len(l) <= 100 for l in out.split('\n\n')[1].splitlines())


def test_the_command_without_weights(tiny_candidate, hub, image_folder, capsys):
    assert main(['backbones', str(image_folder), *tiny_candidate, '--valid', 'none', '--valid-pct', '.5']) == 0
    out = capsys.readouterr().out
    assert '12 training images' in out and '>' not in out and 'does not answer' in out and 'from scratch' in out
    assert 'model.safetensors from https://huggingface.co/timm/test_resnet.r160_in1k' in out and '--weights-dir' in out


@pytest.mark.parametrize('options,says', [
    (['--minutes', '0'], '--minutes is 0'), (['--minutes', 'nan'], '--minutes is nan'), (['--minutes', 'x'], "'--minutes', 'x'"),
    (['--minutes', '1', '--size', '4'], "'size' is 4"), (['--minutes', '1', '--head', 'gatd'], "did you mean 'gated'"),
    (['--minutes', '1', '--only', 'resnet18'], "did you mean 'resnet18.a1_in1k'"), ([], "Missing option '--minutes'"),
    (['--minutes', '1', '--weights-dir', 'nowhere'], "no folder 'nowhere'"), (['--minutes', '1', '--valid', 'vall'], 'vall'),
    (['--minutes', '1', '--device', 'cuda:7'], 'was asked for')])
def test_a_mistake_is_one_line(options, says, hub, image_folder, capsys):
    assert main(['backbones', str(image_folder), *options]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and says in err


def test_no_folder(capsys):
    assert main(['backbones', 'nowhere', '--minutes', '1']) == 2 and "there is no folder 'nowhere'" in capsys.readouterr().err
